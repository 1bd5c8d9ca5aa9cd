"""The Triton kernels: precision at real sizes, memory, reproducibility, and life among PyTorch's other machinery."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from tsl_cases import DEVICE, INPUTS, random_case, run, unchecked

from kernels.tsl import tsl_loss
from kernels.tsl.triton_op import cosine_op, pool_op

ON_GPU = torch.cuda.is_available()
ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def relative_errors(case: dict, **settings) -> dict[str, float]:
    """|x - exact| / |exact| of loss and gradients, against the definition on the same values in float64.

    Of cosines, the largest error: their scale is 1, and those of unrelated vectors are as near 0 as chance has it.
    """
    exact_case = {name: value.double() if torch.is_tensor(value) else value for name, value in case.items()}
    exact_case["sample_index_M"] = case["sample_index_M"]
    exact, exact_gradients = run(exact_case, backend="reference", **settings)
    found, gradients = run(case, backend="triton", **settings)
    pairs = {"loss": (found.loss, exact.loss)} | {name: (gradients[name], exact_gradients[name]) for name in gradients}
    return {
        "cosine": (found.cosine_M - exact.cosine_M).abs().max().item(),
        **{name: ((ours - value).norm() / value.norm()).item() for name, (ours, value) in pairs.items()},
    }


LIMITS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize(
    ("grid", "first_token", "dim", "out", "mode", "dtype"),
    [
        pytest.param((7, 7), 1, 768, 512, "touch", torch.float32, id="ViT-B/32 in fp32"),
        pytest.param((7, 7), 1, 768, 512, "coverage", torch.bfloat16, id="ViT-B/32 in bf16"),
        pytest.param((7, 7), 1, 768, 512, "touch", torch.float16, id="ViT-B/32 in fp16"),
        pytest.param((14, 14), 1, 384, 384, "coverage", torch.float32, id="ViT-S/16 in fp32"),
        pytest.param((24, 24), 1, 1024, 768, "touch", torch.bfloat16, id="ViT-L/14@336 in bf16"),
        pytest.param((37, 37), 0, 1152, 1152, "coverage", torch.float32, id="1,369 cells of width 1152 in fp32"),
        pytest.param((1, 2048), 0, 384, 512, "touch", torch.bfloat16, id="2,048 text tokens in bf16"),
    ],
)
def test_outputs_and_gradients_are_near_float64_at_real_sizes(grid, first_token, dim, out, mode, dtype):
    case = random_case(21, samples=2, grid=grid, dim=dim, out=out, regions=3, dtype=dtype)
    before = case["tokens_BND"].new_ones(2, first_token, dim)
    case["tokens_BND"] = torch.cat([before, case["tokens_BND"]], dim=1)
    errors = relative_errors({**case, "first_token": first_token}, mode=mode)
    assert max(errors.values()) <= LIMITS[dtype], errors


def test_a_hundred_regions_on_one_sample_agree():
    case = random_case(22, samples=3, grid=(5, 6), regions=100, dtype=torch.float32)
    case["sample_index_M"] = torch.full_like(case["sample_index_M"], 1)
    assert max(relative_errors(case).values()) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_lie_beyond_what_32_bits_can_address(dtype):
    stride = 1_200_000_000  # two of these pass 2³¹ - 1; untouched pages of the buffer take no memory
    case = random_case(23, samples=3, grid=(2, 2), dim=8, regions=6, dtype=torch.float16)
    case["sample_index_M"] = torch.tensor([0, 1, 1, 2, 2, 2], dtype=dtype, device=DEVICE)
    buffer = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    far = buffer.as_strided((3, 4, 8), (stride, 8, 1))
    far.copy_(case["tokens_BND"])
    found, expected = (unchecked({**case, "tokens_BND": each}, "triton") for each in (far, case["tokens_BND"]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_gradients_are_identical_from_run_to_run():
    case = random_case(24, samples=4, grid=(9, 9), dim=96, out=64, regions=40, dtype=torch.float32)
    first, second = (run(case, backend="triton") for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0)])
def test_the_gradient_has_the_strides_of_the_tokens(order):
    case = random_case(25, dtype=torch.float32)
    tokens = case["tokens_BND"].permute(order).contiguous().permute(order)  # each order is its own inverse
    tokens.requires_grad_()
    result = tsl_loss(**{**case, "tokens_BND": tokens}, backend="triton")
    (gradient,) = torch.autograd.grad(result.loss, tokens)
    assert gradient.stride() == tokens.stride()


@pytest.mark.parametrize("index", [-1, 3, 2**31 - 1])
def test_a_sample_that_does_not_exist_gives_nan_and_reads_nothing(index):
    case = random_case(27, dtype=torch.float32)
    case["sample_index_M"][4] = index
    case["tokens_BND"].requires_grad_()
    result = unchecked(case, "triton")
    assert result.loss.isnan()
    assert result.cosine_M.isnan().nonzero().flatten().tolist() == [4]
    result.loss.backward()


def test_the_operators_keep_the_rules_of_torch_library():
    case = random_case(28, dtype=torch.float32)
    for name in ("tokens_BND", "ln_weight_D", "ln_bias_D", "target_ME"):
        case[name].requires_grad_()
    pool = (case["tokens_BND"], case["boxes_M4"], case["sample_index_M"], (4, 5), 0)
    torch.library.opcheck(pool_op, (*pool, case["ln_weight_D"], case["ln_bias_D"], True, 1e-5, torch.float32))
    torch.library.opcheck(pool_op, (*pool, None, None, False, 1e-5, torch.float32))
    feature_ME = torch.randn(9, 6, device=DEVICE, requires_grad=True)
    torch.library.opcheck(cosine_op, (feature_ME, case["target_ME"], torch.zeros(9, dtype=torch.bool, device=DEVICE)))


def test_checkpointing_the_loss_changes_no_gradient():
    case = random_case(29, dtype=torch.float32)
    leaves = [case[name].requires_grad_() for name in INPUTS]
    plain = tsl_loss(**case, backend="triton").loss
    again = checkpoint(lambda: tsl_loss(**case, backend="triton").loss, use_reentrant=False)
    expected, actual = (torch.autograd.grad(loss, leaves) for loss in (plain, again))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", INPUTS)
def test_any_one_input_may_be_all_that_wants_a_gradient(wanted):
    case = random_case(30, dtype=torch.float32)
    _, expected = run(case, backend="triton")
    case[wanted].requires_grad_()
    result = tsl_loss(**case, backend="triton")
    (gradient,) = torch.autograd.grad(
        result.loss + (torch.linspace(-1, 1, 9, device=DEVICE) * result.cosine_M).sum(), case[wanted]
    )
    torch.testing.assert_close(gradient, expected[wanted], rtol=0, atol=0)


def in_a_process(*arguments: str) -> str:
    """Output of Python with these arguments, outside of Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("dtype", "capability"), [("bf16", 90), ("fp32", 80)])
def test_every_kernel_compiles_for_a_gpu_that_is_not_here(dtype, capability):
    output = in_a_process("-m", "tests.kernels.compile_for_gpu", dtype, str(capability))
    for kernel in ("pool_normalise", "cosine", "mean_error", "cosine_backward", "normalise_backward", "pool_backward"):
        assert f"{kernel}_kernel {dtype}" in output


CALL = (
    "tsl_loss(one, torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0]), (1, 1), None, None, None, one[0], backend={!r})"
)
SETUP = "import torch\nfrom kernels.tsl import tsl_loss\none = torch.ones(1, 1, 2)\n"


def test_triton_for_tokens_on_the_cpu_is_refused_with_the_remedy():
    program = f"{SETUP}try: {CALL.format('triton')}\nexcept ValueError as error: print(error)"
    assert "needs a GPU, not cpu; choose auto or eager, or set TRITON_INTERPRET=1" in in_a_process("-c", program)


def test_without_triton_installed_auto_runs_eager_and_triton_is_refused():
    hide = "import importlib.util; importlib.util.find_spec = lambda name: None\n"
    program = f"{SETUP.replace('from', hide + 'from')}print({CALL.format('auto')}.count)\n"
    program += f"try: {CALL.format('triton')}\nexcept ValueError as error: print(error)"
    output = in_a_process("-c", program)
    assert "tensor(1)" in output
    assert "'triton' is not available; choose one of auto, reference, eager" in output


@needs_gpu
def test_auto_takes_triton_on_a_gpu_and_never_waits_for_it():
    case = random_case(31, dtype=torch.float32)
    run(case)  # the first call compiles, and tunes
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(case)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, run(case, backend="triton"), rtol=0, atol=0)


@needs_gpu
def test_memory_beside_inputs_and_gradients_grows_with_the_regions_alone():
    case = random_case(32, samples=64, grid=(16, 16), dim=512, out=256, regions=64, dtype=torch.bfloat16)
    run(case)
    leaves = {name: case[name].requires_grad_() for name in INPUTS}
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    tsl_loss(**{**case, **leaves}).loss.backward()
    extra = torch.cuda.max_memory_allocated() - held - sum(leaf.nbytes for leaf in leaves.values())
    assert extra < case["tokens_BND"].nbytes / 4
