"""The demo's script: which scenes, which runs, and what is compared."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from goal_ray.atomic import write_bytes
from goal_ray.config import load_config
from goal_ray.demo.accuracy import lism_accuracy
from goal_ray.evaluate.run import evaluate
from goal_ray.events import say
from goal_ray.lism.config import LismConfig
from goal_ray.lism.gallery import GALLERY_FILE
from goal_ray.lism.run import run_lism
from goal_ray.metric_names import DIRECTIONS
from goal_ray.ray_session import ray_session
from goal_ray.report.run import write_report
from goal_ray.scenes.run import SceneSettings, draw_scenes
from goal_ray.train.config import TrainConfig
from goal_ray.train.run import TrainResult, train

HERE = Path(__file__).parent
RESULT_FILE = "demo.json"
DEVICE = "cpu"  # as the recipes say
MODELS = {"start": "start", "global": "global loss only", "goal": "GOAL"}
GLOBAL_ONLY = ("loss.weight_local=0", "loss.weight_tsl_image=0", "loss.weight_tsl_text=0", "name=global")
MEASURES = {"captions": "R@1", "sentences": "R@1", "joint": "mAP"}
STAGES = {
    "scenes": "draw the scenes",
    "start": "train a small CLIP on short captions, the start",
    "pairs": "find the local pairs of the long captions with LISM",
    "global": "fine-tune the start with the global loss only",
    "goal": "fine-tune the start with GOAL",
    "metrics": "evaluate the three",
    "report": "write the report",
}


@dataclass(frozen=True)
class SceneSet:
    """A set of scenes: how many, what they look like, and what its seed adds to the demo's."""

    count: int
    settings: SceneSettings
    seed: int


SCENES = {
    "short": SceneSet(8000, SceneSettings(size=72, min_objects=2, max_objects=3, crops=0.6, short=True), 1),
    "train": SceneSet(300, SceneSettings(shard_size=75), 2),
    "test": SceneSet(1000, SceneSettings(paired=True), 3),
}
SEED_STRIDE = 1000


def run_demo(out: str | Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Runs the demo once per seed, each in a folder OUT/seed-N. Prints and stores the results.

    Returns {"seeds": [result per seed], "mean": …, "spread": …}; a result is what `run_seed` returns. What an earlier,
    interrupted call finished is not done again.
    """
    out = Path(out).absolute()
    results: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    with ray_session(busy_cpus=2):
        for seed in seeds:
            results.append(run_seed(out / f"seed-{seed}", seed))
            summary = {"seeds": results, **spread(results)}
            write_bytes(str(out / RESULT_FILE), json.dumps(summary, indent=2).encode())
            print_result(results[-1], out)
    if len(results) > 1:
        print_spread(summary)
    return summary


def run_seed(folder: Path, seed: int) -> dict[str, Any]:
    """One demo in one folder.

    Returns {"seed", "seconds", "models": {"start" | "global" | "goal": {"train_seconds", "captions", "sentences",
    "joint"}}, "lism": accuracy against the truth, "report", "gallery": their places in OUT}. The three are
    `retrieval_metrics`: of captions and pictures; of a sentence and its true region from each picture; of both
    together. "seconds" are those of this call, which does not repeat what an earlier one finished.
    """
    began = time.perf_counter()
    say_stage(seed, "scenes")
    scenes = {name: str(folder / "scenes" / name) for name in SCENES}
    for name, kind in SCENES.items():
        draw_scenes(scenes[name], kind.count, SEED_STRIDE * seed + kind.seed, kind.settings)
    say_stage(seed, "start")
    start = fit("start.yaml", folder, seed, scenes["short"], str(HERE / "demo_clip.json"))
    say_stage(seed, "pairs")
    paired = str(folder / "paired")
    matcher = f"matcher.model.name={start.model_dir}", "matcher.model.weights=", "matcher.crop_mode=squash"
    run_lism(scenes["train"], paired, load_config(LismConfig, None, [*matcher, f"device={DEVICE}"]))
    say_stage(seed, "global")
    runs = {"start": start, "global": fit("finetune.yaml", folder, seed, paired, str(start.model_dir), GLOBAL_ONLY)}
    say_stage(seed, "goal")
    runs["goal"] = fit("finetune.yaml", folder, seed, paired, str(start.model_dir))
    say_stage(seed, "metrics")
    metrics = {name: evaluate(str(run.run_dir), scenes["test"], device=DEVICE, pairs=1) for name, run in runs.items()}
    say_stage(seed, "report")
    write_report([str(run.run_dir) for run in runs.values()], str(folder / "report.html"))
    return {
        "seed": seed,
        "seconds": round(time.perf_counter() - began, 1),
        "models": {
            name: {
                "train_seconds": round(run.seconds, 1),
                "captions": {key: metrics[name][key] for key in (*DIRECTIONS, "count")},
                "sentences": metrics[name]["local"],
                "joint": metrics[name]["joint"],
            }
            for name, run in runs.items()
        },
        "lism": asdict(lism_accuracy(paired)),
        "report": f"{folder.name}/report.html",
        "gallery": f"{folder.name}/paired/{GALLERY_FILE}",
    }


def say_stage(seed: int, stage: str) -> None:
    """Tells, above the stage's own progress, how far the demo is."""
    number = list(STAGES).index(stage) + 1
    say("demo", f"seed-{seed}", f"seed {seed}, stage {number} of {len(STAGES)}: {STAGES[stage]}")


def fit(recipe: str, folder: Path, seed: int, shards: str, model: str, more: Sequence[str] = ()) -> TrainResult:
    """Trains by one of the demo's recipes, or goes on where an interrupted demo stopped."""
    places = [f"model.name={model}", f"data.shards={shards}", f"storage_path={folder / 'runs'}", f"seed={seed}"]
    config = load_config(TrainConfig, HERE / recipe, [*places, *more])
    return train(config, resume=None)


def table_head(cell: int) -> str:
    """The line above a table with cells so many letters wide."""
    return f"{'':<18}" + "".join(f"{f'{part} {at}':>{cell}}" for part, at in MEASURES.items())


def print_result(result: Mapping[str, Any], out: Path) -> None:
    """Prints one seed's table, on 80 columns."""
    lism, goal = result["lism"], result["models"]["goal"]
    print(f"\nseed {result['seed']}; {result['seconds']:.0f} s in this call")
    print(
        "retrieval in percent, text→image / image→text, of held-out scenes: R@1 of\n"
        f"{goal['captions']['count']} captions and pictures, R@1 of {goal['sentences']['count']} sentences and "
        "regions, mAP of both"
    )
    print(f"{table_head(16)}{'training, s':>13}")
    for name, label in MODELS.items():
        model = result["models"][name]
        cells = (" / ".join(f"{model[part][way][at]:.1f}" for way in DIRECTIONS) for part, at in MEASURES.items())
        print(f"{label:<18}" + "".join(f"{cell:>16}" for cell in cells) + f"{model['train_seconds']:>13.0f}")
    right, found = 100 * lism["right_region"], 100 * lism["object_recall"]
    print(f"LISM: {right:.1f} % of {lism['sentences']} sentences got a region with IoU ≥ 0.5 on their object;")
    print(f"      {found:.1f} % of the objects have a proposed region with IoU ≥ 0.5")
    print(f"curves and pictures: {out / result['report']}\nLISM's pairs: {out / result['gallery']}")
    print(f"all numbers: {out / RESULT_FILE}")


def spread(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and, for two seeds or more, sample standard deviation of MEASURES, and of GOAL minus global only."""

    def over_seeds(values: list[float]) -> dict[str, float]:
        deviation = {"std": statistics.stdev(values)} if len(values) > 1 else {}
        return {"mean": statistics.mean(values), **deviation}

    def values(name: str, part: str, way: str) -> list[float]:
        return [result["models"][name][part][way][MEASURES[part]] for result in results]

    def gains(part: str, way: str) -> list[float]:
        return [goal - base for goal, base in zip(values("goal", part, way), values("global", part, way), strict=True)]

    return {
        "models": {
            name: {part: {way: over_seeds(values(name, part, way)) for way in DIRECTIONS} for part in MEASURES}
            for name in MODELS
        },
        "goal_minus_global": {part: {way: over_seeds(gains(part, way)) for way in DIRECTIONS} for part in MEASURES},
    }


def print_spread(summary: Mapping[str, Any]) -> None:
    """Prints the table over seeds: mean ± sample standard deviation."""
    print(f"\nover {len(summary['seeds'])} seeds, mean ± standard deviation, text→image / image→text, in percent")
    print(table_head(26))
    rows = {label: summary["models"][name] for name, label in MODELS.items()}
    rows["GOAL - global"] = summary["goal_minus_global"]
    for label, row in rows.items():
        values = ([row[part][way] for way in DIRECTIONS] for part in MEASURES)
        cells = (" / ".join(f"{each['mean']:.1f} ± {each['std']:.1f}" for each in both) for both in values)
        print(f"{label:<18}" + "".join(f"{cell:>26}" for cell in cells))
