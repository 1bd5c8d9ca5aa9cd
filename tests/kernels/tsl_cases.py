"""Cases of the token-similarity loss, and what its tests do with them."""

import torch

from kernels.tsl import TslResult, tsl_loss
from kernels.tsl.op import BACKENDS as IMPLEMENTATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ["reference", "eager", "triton"]
FAST_BACKENDS = BACKENDS[1:]
MODES = ["coverage", "touch"]
INPUTS = ("tokens_BND", "ln_weight_D", "ln_bias_D", "proj_DE", "target_ME")
FLOATS = (*INPUTS, "boxes_M4")


def random_case(seed, samples=3, grid=(4, 5), dim=7, out=6, regions=9, dtype=torch.float64, device=DEVICE):
    """Fresh random arguments of `tsl_loss`; boxes reach over the grid's borders, and a few are empty."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).to(device, dtype)

    height, width = grid
    corners = torch.rand(regions, 2, 2, generator=random, dtype=torch.float64) * 1.4 - 0.2
    low, high = corners.amin(1), corners.amax(1)
    low[regions // 2 : regions // 2 + 1, 0] = 1.1  # beyond the right border, and inverted
    scale = torch.tensor([width, height], dtype=torch.float64)
    return {
        "tokens_BND": normal(samples, height * width, dim),
        "boxes_M4": torch.cat([low * scale, high * scale], dim=1).to(device, torch.promote_types(dtype, torch.float32)),
        "sample_index_M": torch.randint(samples, (regions,), generator=random).sort().values.to(device),
        "grid": grid,
        "ln_weight_D": normal(dim) * 0.2 + 1,
        "ln_bias_D": normal(dim) * 0.2,
        "proj_DE": normal(dim, out),
        "target_ME": normal(regions, out),
    }


def run(case: dict, **settings) -> tuple[TslResult, dict[str, torch.Tensor]]:
    """The result, and the gradient of loss + a fixed mix of the cosines for every differentiable input."""
    leaves = {name: case[name].detach().clone().requires_grad_() for name in INPUTS if case[name] is not None}
    result = tsl_loss(**{**case, **leaves}, **settings)
    mix = torch.linspace(-1, 1, len(result.cosine_M), dtype=result.cosine_M.dtype, device=result.cosine_M.device)
    (result.loss + (mix * result.cosine_M).sum()).backward()
    return result, {name: leaf.grad for name, leaf in leaves.items()}


def unchecked(case: dict, backend: str, **settings) -> TslResult:
    """The backend itself, past the checks of values that `tsl_loss` makes on the CPU."""
    return IMPLEMENTATIONS[backend](**{"mode": "coverage", "eps": 1e-5, "first_token": 0, **case, **settings})


def assert_same(case: dict, backend: str, rtol: float = 1e-9, atol: float = 1e-11, **settings) -> None:
    """The backend gives what the definition gives: outputs and all gradients."""
    expected, expected_gradients = run(case, backend="reference", **settings)
    actual, gradients = run(case, backend=backend, **settings)
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradients, expected_gradients, rtol=rtol, atol=atol)


def with_boxes(case: dict, *boxes: tuple[float, ...]) -> dict:
    """The case with these boxes, all on sample 0."""
    rows = len(boxes)
    return {
        **case,
        "boxes_M4": case["boxes_M4"].new_tensor(boxes).reshape(rows, 4),
        "sample_index_M": case["sample_index_M"].new_zeros(rows),
        "target_ME": case["target_ME"][:rows],
    }
