"""Evaluation of a run's checkpoints beside the training: which is the best, and whether to go on."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from goal_ray.checkpoints import checkpoint_folder, checkpoint_folders, step_of
from goal_ray.errors import StageError
from goal_ray.jsonl import append_records
from goal_ray.metric_names import by_dotted_name
from goal_ray.run_folder import HISTORY_FILE
from goal_ray.train.config import EvaluationConfig
from goal_ray.train.places import Demand
from goal_ray.train.recorder import keep_steps


class Evaluations:
    """Evaluates one checkpoint after the other in a Ray task; RUN/evaluations.jsonl keeps the results by step.

    While one is evaluated the newest of those that come waits, and those between are left out: a slow evaluation costs
    points of the curve, not a disk full of checkpoints. Results beyond the newest checkpoint are dropped: these steps
    come again, maybe with other settings.

    draw  takes a step and its numbers, for the curves
    say   takes a line for the user
    """

    def __init__(
        self,
        run_dir: Path,
        config: EvaluationConfig,
        draw: Callable[[int, dict[str, float]], None],
        say: Callable[[str], None],
    ):
        self.run_dir = run_dir
        self.config = config
        self.draw = draw
        self.say = say
        folders = checkpoint_folders(run_dir)
        history = keep_steps(run_dir / HISTORY_FILE, step_of(folders[-1]) if folders else 0)
        self.values = {record["step"]: record[config.metric] for record in history if config.metric in record}
        self.waiting: int | None = None
        self.running: tuple[int, Any] | None = None
        self.place = Demand()
        for folder in folders:
            self.add(step_of(folder))

    def add(self, step: int) -> None:
        """Takes a complete checkpoint; one that was evaluated, or is being, is not evaluated again."""
        if self.config.shards is not None and step not in self.values and step not in self.needed:
            self.waiting = step

    @property
    def needed(self) -> set[int]:
        """Steps whose checkpoints must stay: the best and those still to be evaluated."""
        running = None if self.running is None else self.running[0]
        return {step for step in (self.waiting, running, self.best) if step is not None}

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint that is there, the earliest of equals; None before the first evaluation."""
        there = [step for step in sorted(self.values) if checkpoint_folder(self.run_dir, step).exists()]
        sign = -1 if self.config.lower_is_better else 1
        return max(there, key=lambda step: sign * self.values[step], default=None)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` evaluations all were no better than one before them."""
        sign = -1 if self.config.lower_is_better else 1
        curve = [sign * self.values[step] for step in sorted(self.values)]
        patience = self.config.patience
        return patience is not None and len(curve) > patience and max(curve[-patience:]) <= max(curve[:-patience])

    @property
    def has_place(self) -> bool:
        """Whether an evaluation holds its CPUs and GPUs now."""
        return all(self.place.found()) if self.running is not None else False

    @property
    def left(self) -> int:
        """How many are still to be done."""
        return (self.running is not None) + (self.waiting is not None)

    def poll(self, wait_s: float = 0.0, may_start: bool = True) -> None:
        """Takes a result that is there, and starts the next evaluation, if it `may_start`."""
        import ray

        if may_start and self.running is None and self.waiting is not None:
            self.running = self.waiting, self._start(self.waiting)
            self.waiting = None
        if self.running is None:
            return
        step, reference = self.running
        ready, _ = ray.wait([reference], timeout=wait_s)
        if ready:
            self.running = None
            self.place.want([])
            self._take(step, reference)

    def finish(self, tick: Callable[[], None], interrupted: Callable[[], bool], patience_s: float) -> bool:
        """Waits for all evaluations. Returns whether they came, and no interruption before them.

        Raises StageError where one has waited for its place for so long.
        """
        since = time.monotonic()
        while self.left:
            if interrupted():
                return False
            self.poll(wait_s=0.5)
            tick()
            if self.running is None or self.has_place:
                since = time.monotonic()
            elif time.monotonic() - since > patience_s:
                raise StageError(
                    f"no node has had {self.config.needs} free for the evaluation of step {self.running[0]} for "
                    f"{patience_s:.0f} s; lower evaluation.cpus or evaluation.gpus, or add such a node, then go on "
                    "with --resume"
                )
        return True

    def _start(self, step: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.place.want([[self.config.bundle]])
        # One call a process, or an idle one would keep a GPU's memory that Ray lends to another.
        task = ray.remote(max_calls=1)(evaluate_checkpoint)
        reserved = task.options(
            num_cpus=self.config.cpus,
            num_gpus=self.config.gpus,
            max_retries=2,
            scheduling_strategy=PlacementGroupSchedulingStrategy(self.place.waiting[0]),
        )
        return reserved.remote(str(checkpoint_folder(self.run_dir, step)), self.config)

    def _take(self, step: int, reference: Any) -> None:
        import ray

        try:
            self.record(step, ray.get(reference))
        except ray.exceptions.RayError as error:  # the training is worth more than one of its evaluations
            cause = getattr(error, "cause", error)
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[-1]
            self.say(f"the evaluation of step {step} failed: {reason}")

    def record(self, step: int, result: dict[str, Any]) -> None:
        """Takes what `evaluate` found of a checkpoint."""
        numbers = by_dotted_name(result)
        append_records(self.run_dir / HISTORY_FILE, [{"step": step, **numbers}])
        self.draw(step, numbers)
        if self.config.metric not in numbers:
            return self.say(
                f"the evaluation of step {step} gave no {self.config.metric}: the held-out set has too few answers for "
                f"it; set evaluation.metric to one of {', '.join(sorted(numbers))}"
            )
        self.values[step] = numbers[self.config.metric]
        mark = ", the best so far" if self.best == step else ""
        return self.say(f"step {step}: {self.config.metric} {self.values[step]:.2f}{mark}")


def evaluate_checkpoint(folder: str, config: EvaluationConfig) -> dict[str, Any]:
    """As `goal_ray.evaluate.run.evaluate`, which only the process that evaluates needs to import."""
    from goal_ray.evaluate.run import evaluate

    device = "cuda" if config.gpus else "cpu"
    # No more threads than it reserved: the training's ingest runs on the same cores.
    return evaluate(folder, str(config.shards), device=device, pairs=config.pairs, threads=config.cpus)
