"""The token-similarity loss: the definition does what its documentation says, and every backend does the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tsl_cases import (
    BACKENDS,
    DEVICE,
    FAST_BACKENDS,
    FLOATS,
    INPUTS,
    MODES,
    assert_same,
    random_case,
    run,
    unchecked,
    with_boxes,
)

from kernels.tsl import tsl_loss


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mode", "pooled"), [("coverage", [1.0, 4.0]), ("touch", [2.0, 3.0])])
def test_a_hand_computed_example_comes_out(backend, mode, pooled):
    # A 1×2 grid with the tokens (0, 5) and (4, 1); the box covers 0.75 of the first cell, 0.25 of the next:
    # coverage 0.75 : 0.25 gives (1, 4), touch the plain mean (2, 3). LayerNorm of two different numbers is (-1, 1).
    tokens = torch.tensor([[[0.0, 5.0], [4.0, 1.0]]], dtype=torch.float64, device=DEVICE)
    scale, bias = (
        torch.tensor([2.0, 1.0], dtype=torch.float64, device=DEVICE),
        torch.tensor([0.0, 1.0], dtype=torch.float64, device=DEVICE),
    )
    projection = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64, device=DEVICE)
    target = torch.tensor([[0.0, 5.0, 0.0]], dtype=torch.float64, device=DEVICE)
    result = tsl_loss(
        tokens,
        torch.tensor([[0.25, 0.2, 1.25, 0.7]], dtype=torch.float64, device=DEVICE),
        torch.tensor([0], device=DEVICE),
        (1, 2),
        scale,
        bias,
        projection,
        target,
        mode=mode,
        eps=1e-12,
        backend=backend,
    )
    assert pooled[0] < pooled[1]  # so LayerNorm gives (-1, 1), scaled and shifted (-2, 2), projected (-2, 2, 0)
    cosine = 2 / math.sqrt(8)
    assert result.cosine_M.tolist() == pytest.approx([cosine])
    assert result.loss.item() == pytest.approx((1 - cosine) ** 2)
    assert result.count.item() == 1
    assert result.count.shape == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("mode", "weights"), [("coverage", [0.75, 0.25, 0.0]), ("touch", [0.5, 0.5, 0.0])])
def test_weights_are_the_overlap_or_one_for_every_touched_cell(backend, mode, weights):
    # With tokens that are unit vectors, the pooled row is the row of weights itself.
    tokens = torch.eye(3, dtype=torch.float64, device=DEVICE)[None]
    target = F.layer_norm(torch.tensor([weights], dtype=torch.float64, device=DEVICE), (3,))
    box = torch.tensor([[0.25, 0.2, 1.25, 0.7]], dtype=torch.float64, device=DEVICE)
    result = tsl_loss(
        tokens,
        box,
        torch.tensor([0], device=DEVICE),
        (1, 3),
        None,
        None,
        None,
        target,
        mode=mode,
        eps=1e-12,
        backend=backend,
    )
    assert result.cosine_M.item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_a_backend_equals_the_definition_in_values_and_gradients(backend, seed, mode):
    assert_same(random_case(seed), backend, mode=mode)


# Quarters fall on cell borders often, where an off-by-one would show; other floats rarely do.
CORNER = st.one_of(st.integers(-8, 32).map(lambda quarters: quarters / 4), st.floats(-2, 8, width=32))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@given(boxes=st.lists(st.tuples(CORNER, CORNER, CORNER, CORNER), max_size=6), mode=st.sampled_from(MODES))
@settings(max_examples=60)
def test_any_boxes_pool_as_defined(backend, boxes, mode):
    case = with_boxes(random_case(1, samples=1), *boxes)
    expected, actual = (tsl_loss(**case, mode=mode, backend=each) for each in ("reference", backend))
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("absent", [("ln_weight_D",), ("ln_bias_D",), ("ln_weight_D", "ln_bias_D", "proj_DE")])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_layer_norm_and_projection_may_be_absent(backend, absent):
    case = random_case(7, out=7)
    assert_same({**case, **dict.fromkeys(absent)}, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_finite_differences(backend, mode):
    case = random_case(11, samples=2, grid=(2, 3), dim=4, out=3, regions=4)
    leaves = [case[name].requires_grad_() for name in INPUTS]

    def outputs(*values):
        result = tsl_loss(**{**case, **dict(zip(INPUTS, values, strict=True))}, mode=mode, backend=backend)
        return result.loss, result.cosine_M

    assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("zero", ["target", "feature"])
def test_vectors_of_no_length_have_cosine_zero_and_the_gradients_of_the_definition(backend, zero):
    case = random_case(33)
    if zero == "target":
        case["target_ME"][2] = 0
    else:
        case |= {"ln_weight_D": torch.zeros_like(case["ln_weight_D"]), "ln_bias_D": None}
    cosine_M = tsl_loss(**case, backend=backend).cosine_M
    assert (cosine_M[2] if zero == "target" else cosine_M.abs().max()).item() == 0
    assert_same(case, backend)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize(
    "box",
    [
        pytest.param((1.3, 2.2, 1.4, 2.9), id="inside one cell"),
        pytest.param((0.5, 1.5, 0.5 + 1e-9, 1.5 + 1e-9), id="almost nothing"),
        pytest.param((1.0, 1.0, 3.0, 2.0), id="on cell borders"),
        pytest.param((0.0, 0.0, 5.0, 4.0), id="the grid"),
        pytest.param((-3.0, -2.0, 9.0, 8.0), id="more than the grid"),
        pytest.param((4.5, 3.5, 7.0, 9.0), id="over the corner"),
        pytest.param((1e-20, 1e-20, 2e-20, 2e-20), id="area near underflow"),
    ],
)
def test_boxes_at_the_edges_of_what_is_possible_agree(box, backend, mode):
    assert_same(with_boxes(random_case(3), box), backend, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_box_of_the_whole_grid_pools_the_plain_mean(backend, mode):
    case = with_boxes(random_case(5), (0.0, 0.0, 5.0, 4.0))
    mean_1D = case["tokens_BND"][0].mean(0, keepdim=True)
    feature = F.layer_norm(mean_1D, mean_1D.shape[1:], case["ln_weight_D"], case["ln_bias_D"]) @ case["proj_DE"]
    result = tsl_loss(**case, mode=mode, backend=backend)
    torch.testing.assert_close(result.cosine_M, F.cosine_similarity(feature, case["target_ME"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_box_on_cell_borders_touches_only_the_cells_inside(backend):
    case = with_boxes(random_case(5, grid=(4, 5)), (1.0, 1.0, 3.0, 2.0))
    covered, touched = (tsl_loss(**case, mode=mode, backend=backend).cosine_M for mode in MODES)
    torch.testing.assert_close(touched, covered)


EMPTY_BOXES = [(5.0, 0.0, 8.0, 2.0), (-2.0, 0.0, 0.0, 2.0), (1.0, 1.0, 1.0, 3.0), (3.0, 1.0, 2.0, 3.0), (-1, 0, -1, 0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("regions", [0, 5])
@pytest.mark.parametrize("absent", [(), ("ln_weight_D", "ln_bias_D", "proj_DE")])
def test_nothing_but_empty_boxes_gives_zero_loss_and_zero_gradients(backend, regions, absent):
    case = {**with_boxes(random_case(2, out=7), *EMPTY_BOXES[:regions]), **dict.fromkeys(absent)}
    result, gradients = run(case, backend=backend)
    assert (result.loss.item(), result.count.item()) == (0.0, 0)
    assert result.cosine_M.tolist() == [0.0] * regions
    for name, gradient in gradients.items():
        assert gradient.shape == case[name].shape
        assert (gradient == 0).all()


# On a device nothing checks the values: NaN must not pass for a number, and infinity is beyond the border.
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize("box", [(1.0, 1.0, 2.0, 3.0), EMPTY_BOXES[0], EMPTY_BOXES[2], EMPTY_BOXES[3], EMPTY_BOXES[4]])
def test_a_nan_box_shows_also_where_its_other_sides_leave_it_empty(backend, mode, side, box):
    case = with_boxes(random_case(26, dtype=torch.float32), (0.5, 0.5, 3.0, 3.0), box, EMPTY_BOXES[1])
    case["boxes_M4"][1, side] = math.nan
    result = unchecked(case, backend, mode=mode)
    assert result.loss.isnan()
    assert result.cosine_M.isnan().tolist() == [False, True, False]
    assert result.count.item() == 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", range(4))
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_box_is_clipped(backend, mode, side, value):
    case = with_boxes(random_case(26, dtype=torch.float32), (0.5, 0.5, 3.0, 3.0), (1.0, 1.0, 2.0, 3.0))
    case["boxes_M4"][1, side] = value
    clipped = {**case, "boxes_M4": case["boxes_M4"].clamp(-1e6, 1e6)}
    found, expected = (unchecked(each, backend, mode=mode) for each in (case, clipped))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_float32_boxes_of_float64_tokens_are_weighed_in_float64(backend):
    case = random_case(36)
    case["boxes_M4"] = case["boxes_M4"].float()
    assert_same(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_boxes_take_no_part_in_the_mean(backend):
    case = random_case(4)
    full = (0.5, 0.5, 3.0, 3.0)
    alone = tsl_loss(**with_boxes(case, full), backend=backend)
    among = tsl_loss(**with_boxes(case, full, *EMPTY_BOXES), backend=backend)
    torch.testing.assert_close(among.loss, alone.loss)
    assert among.count.item() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sample_without_regions_gets_a_zero_gradient(backend):
    case = random_case(6, samples=4)
    case["sample_index_M"] = case["sample_index_M"].clamp(max=2)
    _, gradients = run(case, backend=backend)
    assert (gradients["tokens_BND"][3] == 0).all()
    assert (gradients["tokens_BND"][0] != 0).any()


@pytest.mark.parametrize(
    "shape",
    [
        {"samples": 1, "regions": 1},
        {"samples": 2, "regions": 150},
        {"samples": 6, "regions": 2},
        {"samples": 3, "regions": 0},
        {"samples": 1, "grid": (1, 1), "regions": 3},
    ],
)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_ragged_extremes_agree(backend, shape):
    assert_same(random_case(8, **shape), backend)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_regions_need_no_order(backend):
    case = random_case(9)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shuffled = {**case, **{name: case[name][order] for name in ("boxes_M4", "sample_index_M", "target_ME")}}
    assert (shuffled["sample_index_M"].diff() < 0).any()
    torch.testing.assert_close(tsl_loss(**shuffled).cosine_M, tsl_loss(**case).cosine_M[order])
    assert_same(shuffled, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_before_the_first_token_are_not_read_and_get_a_zero_gradient(backend):
    case = random_case(20)
    expected, expected_gradients = run(case, backend=backend)
    cls_B2D = case["tokens_BND"].new_full((3, 2, 7), math.nan)
    whole = {**case, "tokens_BND": torch.cat([cls_B2D, case["tokens_BND"]], dim=1), "first_token": 2}
    result, gradients = run(whole, backend=backend)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    before, cells = gradients.pop("tokens_BND").tensor_split([2], dim=1)
    assert (before == 0).all()
    torch.testing.assert_close({**gradients, "tokens_BND": cells}, expected_gradients, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", ["after the CLS token", "channels first", "every second token"])
def test_tokens_may_be_any_view(backend, view):
    case = random_case(10)
    tokens = case["tokens_BND"]
    samples, rows, dim = tokens.shape
    if view == "after the CLS token":
        base = torch.zeros(samples, rows + 1, dim, dtype=tokens.dtype, device=DEVICE)
        strided = base[:, 1:]
    elif view == "channels first":
        strided = torch.zeros(samples, dim, rows, dtype=tokens.dtype, device=DEVICE).transpose(1, 2)
    else:
        strided = torch.zeros(samples, 2 * rows, dim, dtype=tokens.dtype, device=DEVICE)[:, ::2]
    strided.copy_(tokens)
    assert not strided.is_contiguous()
    strided.requires_grad_()
    result = tsl_loss(**{**case, "tokens_BND": strided}, backend=backend)
    result.loss.backward()
    plain = tokens.clone().requires_grad_()
    expected = tsl_loss(**{**case, "tokens_BND": plain}, backend=backend)
    expected.loss.backward()
    torch.testing.assert_close(result.cosine_M, expected.cosine_M)
    torch.testing.assert_close(strided.grad, plain.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(backend, dtype):
    # Without a projection, which may multiply in bfloat16, nothing is rounded before the end.
    case = {**random_case(12, out=7, dtype=dtype), "proj_DE": None}
    exact, exact_gradients = run(
        {name: value.double() if name in FLOATS and value is not None else value for name, value in case.items()},
        backend="reference",
    )
    result, gradients = run(case, backend=backend)
    assert result.cosine_M.dtype == result.loss.dtype == torch.float32
    torch.testing.assert_close(result.cosine_M.double(), exact.cosine_M, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        # Only the last rounding, of the finished gradient to its input's dtype, is coarse.
        torch.testing.assert_close(gradient.double(), exact_gradients[name], rtol=torch.finfo(dtype).eps, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_coarsen_the_result(backend):
    case = random_case(13, dtype=torch.float32)
    leaves = [case[name].requires_grad_() for name in INPUTS]
    plain = tsl_loss(**case, backend=backend)
    with torch.autocast(DEVICE, torch.bfloat16):
        result = tsl_loss(**case, backend=backend)
    torch.testing.assert_close(result, plain, rtol=0, atol=0)
    gradients, expected = (torch.autograd.grad(each.loss, leaves) for each in (result, plain))
    torch.testing.assert_close(gradients, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_span_is_a_box_on_a_one_row_grid(backend):
    case = random_case(14, samples=2, grid=(1, 12), regions=2)
    case["boxes_M4"] = case["boxes_M4"].new_tensor([[3.0, 0, 7, 1], [0.0, 0, 1, 1]])
    case["sample_index_M"] = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    spans_2D = torch.stack([case["tokens_BND"][0, 3:7].mean(0), case["tokens_BND"][1, 0]])
    feature = F.layer_norm(spans_2D, (7,), case["ln_weight_D"], case["ln_bias_D"]) @ case["proj_DE"]
    for mode in MODES:
        result = tsl_loss(**case, mode=mode, backend=backend)
        torch.testing.assert_close(result.cosine_M, F.cosine_similarity(feature, case["target_ME"]))


@pytest.fixture
def no_graphs_yet():
    """Dynamo computes uncompiled what it has compiled for eight kinds of arguments."""
    torch.compiler.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.usefixtures("no_graphs_yet")
def test_a_backend_compiles_to_one_graph_with_the_same_gradients(backend, mode):
    case = random_case(15, dtype=torch.float32)
    leaves = {name: case[name].requires_grad_() for name in INPUTS}
    compiled = torch.compile(tsl_loss, fullgraph=True, backend="aot_eager")
    expected = tsl_loss(**case, mode=mode, backend=backend)
    actual = compiled(**case, mode=mode, backend=backend)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual.loss, leaves.values()), torch.autograd.grad(expected.loss, leaves.values())
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.usefixtures("no_graphs_yet")
def test_a_nan_box_shows_in_a_compiled_graph_too(backend, mode):
    case = with_boxes(random_case(26, dtype=torch.float32), (math.nan, 0.5, 3.0, 3.0), (0.5, 9.0, math.nan, 9.5))
    compiled = torch.compile(tsl_loss, fullgraph=True, backend="aot_eager")
    result = compiled(**case, mode=mode, backend=backend)
    assert result.cosine_M.isnan().tolist() == [True, True]
    assert result.loss.isnan()


@pytest.mark.parametrize("tsl_backend", FAST_BACKENDS)
@pytest.mark.usefixtures("no_graphs_yet")
def test_changing_numbers_of_regions_compile_once(tsl_backend):
    graphs = []

    def counting(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(tsl_loss, fullgraph=True, dynamic=True, backend=counting)
    for regions in (5, 9, 14):
        case = {**random_case(16, regions=regions, dtype=torch.float32), "backend": tsl_backend}
        torch.testing.assert_close(compiled(**case), tsl_loss(**case))
    assert len(graphs) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_eager_on_a_gpu_never_waits_for_it_and_agrees():
    case = random_case(19, dtype=torch.float32, device="cuda")
    run(case)  # warms up libraries, whose first call may synchronise
    torch.cuda.set_sync_debug_mode("error")
    try:
        result, gradients = run(case, backend="eager")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected, expected_gradients = run(case, backend="reference")
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)
