"""The benchmark: what it compares computes the same loss; what it counts is right. Timings need a GPU."""

import json

import pytest
import torch
from tsl_cases import DEVICE, random_case

from kernels.benchmark import __main__ as benchmark
from kernels.benchmark.cases import DTYPES, SHAPES, Case, necessary_bytes
from kernels.benchmark.competitors import POOLS, RAGGED, eager_with, loop
from kernels.benchmark.measure import relative_errors
from kernels.benchmark.plot import plot
from kernels.tsl.reference import tsl_reference

ON_GPU = torch.cuda.is_available()
SMALL = Case("B/16", 2, 3, "fp32")


@pytest.mark.parametrize("name", [*POOLS, "loop"])
def test_every_competitor_computes_the_loss_and_its_gradients(name):
    loss = loop if name == "loop" else eager_with(POOLS[name])
    errors = relative_errors(loss, SMALL.inputs(DEVICE), "touch")
    assert set(errors) == {"loss", "cosine", "tokens_BND", "ln_weight_D", "ln_bias_D", "proj_DE", "target_ME"}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("name", RAGGED)
def test_a_ragged_pooling_takes_any_number_of_boxes_on_a_sample_and_empty_ones(name):
    case = random_case(1, samples=4, regions=9, dtype=torch.float64)
    settings = {"mode": "touch", "eps": 1e-5, "first_token": 0}
    expected, actual = (each(**case, **settings) for each in (tsl_reference, eager_with(POOLS[name])))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cases_input_is_what_tsl_loss_takes(shape, dtype):
    inputs, tower = Case(shape, 3, 4, dtype).inputs(DEVICE), SHAPES[shape]
    height, width = tower.grid
    assert inputs["tokens_BND"].shape == (3, tower.first_token + height * width, tower.dim)
    assert inputs["tokens_BND"].dtype == DTYPES[dtype]
    x0, y0, x1, y1 = inputs["boxes_M4"].unbind(1)
    assert ((x0 >= 0) & (x0 < x1) & (x1 <= width + 1e-4)).all()
    assert ((y0 >= 0) & (y0 < y1) & (y1 <= height + 1e-4)).all()
    torch.testing.assert_close(Case(shape, 3, 4, dtype).inputs(DEVICE), inputs, rtol=0, atol=0)


def test_necessary_bytes_count_each_covered_token_once():
    inputs = Case("B/16", 2, 2, "bf16").inputs(DEVICE)
    # On sample 0 six cells and four, two of them shared; on sample 1 one cell and nothing.
    boxes = [[0.0, 0.0, 3.0, 1.5], [1.0, 1.0, 3.0, 3.0], [4.2, 4.2, 4.4, 4.4], [5.0, 5.0, 5.0, 6.0]]
    inputs["boxes_M4"] = torch.tensor(boxes, device=DEVICE)
    forward, backward = necessary_bytes(inputs)
    parameters, targets = 768 * 512 * 4, 4 * 512 * 4
    assert forward == (6 + 4 - 2 + 1) * 768 * 2 + parameters + targets
    assert backward == 2 * 197 * 768 * 2 + 2 * (parameters + targets)


def test_the_command_checks_everything_and_says_what_needs_a_gpu(tmp_path, capsys):
    arguments = ["--shapes", "B/16", "--dtypes", "fp32", "--batches", "2", "--regions", "1"]
    assert benchmark.main([*arguments, "--out", str(tmp_path / "tsl")]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("triton", "loop", *(f"eager, {pool}" for pool in POOLS)))
    if ON_GPU:
        results = json.loads((tmp_path / "tsl.json").read_text())
        assert results["cases"][0]["times"]["triton"]["both"] > 0
        assert (tmp_path / "tsl.png").stat().st_size > 0
    else:
        assert "timings need one" in printed
        assert list(tmp_path.iterdir()) == []


def test_an_error_beyond_the_limit_fails_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "LIMITS", {"fp32": 1e-12})
    monkeypatch.setattr(benchmark, "time_cases", lambda *_: None)
    monkeypatch.setattr(benchmark, "plot", lambda *_: None)
    arguments = ["--shapes", "B/16", "--dtypes", "fp32", "--out", str(tmp_path / "tsl")]
    assert benchmark.main(arguments) == 1
    assert "exceeds 1e-12" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--shapes", "B/32"], ["--batches", "0"], ["--dtypes", "fp8"]])
def test_a_wrong_argument_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(arguments)
    assert stopped.value.code == 2
    assert "error" in capsys.readouterr().err


def measured(batch: int) -> dict:
    """One measured case as `measure` returns it."""
    names = {"triton": 1.0, "eager, bag": 9.0, "compiled, bag": 4.0, "compiled, padded": 2.0, "loop": 500.0}
    times = {
        name: {"forward": 0.4, "backward": 0.6, "both": factor, "extra_bytes": 2**20} for name, factor in names.items()
    }
    case = {"shape": "L/14", "batch": batch, "regions": 4, "dtype": "bf16"}
    return {**case, "floor_s": 0.75, "bandwidth_share": 0.75, "times": times}


def test_the_goals_are_told_from_the_case_they_are_set_for(capsys):
    benchmark.print_goals([measured(16)])
    assert capsys.readouterr().out == ""
    benchmark.print_goals([measured(16), measured(256)])
    printed = capsys.readouterr().out
    assert (
        "4.0 × faster than torch.compile for any number of boxes per sample (goal 3); 2.0 × for equally many" in printed
    )
    assert "500 × faster than the loop (goal 100)" in printed
    assert "75 % of copy bandwidth (goal 70)" in printed


def test_goals_are_told_where_memory_ended_before_every_competitor(capsys):
    case = measured(256)
    case["times"] = {"triton": case["times"]["triton"]}
    benchmark.print_goals([case])
    assert "nan × faster than torch.compile" in capsys.readouterr().out


def test_cases_beyond_the_memory_are_left_out(capsys, monkeypatch):
    def out_of_memory(*_):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(Case, "inputs", lambda case, _, real=Case.inputs: real(case, "cpu"))
    monkeypatch.setattr(benchmark, "time_loss", out_of_memory)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda: 1e12)
    options = benchmark.parse(["--shapes", "B/16", "--dtypes", "fp32", "--batches", "2", "--regions", "1", "3"])
    results = {"versions": {"device": "none"}, "cases": []}
    benchmark.time_cases(results, loop, {}, options)
    assert results["cases"] == []
    assert capsys.readouterr().out.count("triton: out of memory") == 2


def test_the_plot_is_a_picture(tmp_path):
    path = plot({"versions": {"device": "none"}, "cases": [measured(16), measured(64)]}, tmp_path / "tsl.png")
    assert path.read_bytes().startswith(b"\x89PNG")
