"""The measurements as text."""

from typing import Any

from goal_ray.train.benchmark.competitors import PARTS
from goal_ray.train.benchmark.measure import ratio

PUBLISHED_FP32 = "published fp32"
GOALS = {
    ("published", "goal"): {"cpu": "at least 4.5", "cuda": "at least 4"},
    (PUBLISHED_FP32, "goal"): {"cpu": "at least 4.5", "cuda": "at least 4"},
    ("goal", "plain"): {"cpu": "at most 1.15", "cuda": "at most 1.15"},
}


def show_competitors(result: dict[str, Any]) -> str:
    """Ratios with their goals, then a line for each competitor."""
    variants = result["variants"]
    lines = [head(result), ""]
    for (over, under), goals in GOALS.items():
        if over in variants and under in variants:
            low, median, high = ratio(variants[over]["rounds"], variants[under]["rounds"])
            goal = goals[result["settings"]["device"].split(":")[0]]
            name = f"{over} / {under}"
            lines.append(
                f"{name:<22}{median:>6.2f} × the time (half of the rounds {low:.2f} to {high:.2f}; goal: {goal})"
            )
    on_gpu = result["settings"]["device"].startswith("cuda")
    columns = ("step", "image", "text", "losses", "backward", "optimizer", "MFU", "peak memory")
    lines += ["", f"{'ms, medians':<22}" + "".join(f"{column:>12}" for column in columns)]
    if on_gpu:
        lines[-1] += f"{'images/s':>12}"
    for name, each in variants.items():
        # The published style's forwards are one part: they have no common first and last module.
        parts = [each["parts"][part] for part in PARTS]
        cells = [each["seconds"], *(seconds or None for seconds in parts)]
        line = f"{name:<22}" + "".join(f"{'':>12}" if cell is None else f"{1000 * cell:>12.1f}" for cell in cells)
        line += f"{percent(each['mfu']):>12}{gibibytes(each['peak_bytes']):>12}"
        lines.append(line + (f"{each['images_per_s']:>12.0f}" if on_gpu else ""))
    return "\n".join(lines)


def show_switches(result: dict[str, Any], given: str) -> str:
    """A line for each variant: its time and memory as a share of those of the one called `given`."""
    variants = result["variants"]
    base = variants[given]
    lines = [
        head(result),
        "",
        f"{'as a share of ' + given:<30}{'time':>8}  {'(half of the rounds)':<24}{'peak memory':>12}{'ms':>12}{'':>12}",
    ]
    for name, each in variants.items():
        low, median, high = ratio(each["rounds"], base["rounds"])
        spread = "" if name == given else f"({low:.3f} to {high:.3f})"
        memory = each["peak_bytes"] / base["peak_bytes"]
        lines.append(
            f"{name:<30}{median:>8.3f}  {spread:<24}{memory:>12.3f}{1000 * each['seconds']:>12.1f}"
            f"{gibibytes(each['peak_bytes']):>12}"
        )
    return "\n".join(lines)


def head(result: dict[str, Any]) -> str:
    """What was measured on which machine."""
    settings, machine, tokens = result["settings"], result["machine"], result["tokens"]
    on = [name if value is True else f"{name} {value}" for name, value in settings["step"].items() if value]
    return "\n".join(
        [
            f"{settings['model']}, {settings['batch']} pictures and as many crops; captions of {tokens['captions']} "
            f"tokens, sentences of {tokens['sentences']}; {settings['precision']}; on: {', '.join(on) or 'no switch'}",
            f"{machine['device']}; torch {machine['torch']}, open_clip {machine['open_clip']}; seed "
            f"{settings['seed']}; useful work {result['useful_flops'] / 1e12:.3g} TFLOP per step",
        ]
    )


def percent(share: float | None) -> str:
    """A share in percent; unknown where there is none."""
    return "unknown" if share is None else f"{100 * share:.1f} %"


def gibibytes(count: int) -> str:
    """Bytes in GiB."""
    return f"{count / 2**30:.2f} GiB"
