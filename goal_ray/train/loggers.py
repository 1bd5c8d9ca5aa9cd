"""Where curves can be watched: TensorBoard always, Weights & Biases when asked."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

from goal_ray.config import to_tree
from goal_ray.errors import ConfigError
from goal_ray.run_folder import TENSORBOARD_FOLDER
from goal_ray.train.config import TrainConfig


class Logger(Protocol):
    """Takes numbers by name."""

    def log(self, step: int, values: dict[str, float]) -> None: ...
    def rewind(self, step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """RUN/tensorboard; steps that come again hide those before."""

    def __init__(self, run_dir: Path):
        self.folder = str(run_dir / TENSORBOARD_FOLDER)
        self.writer: Any = None

    def rewind(self, step: int) -> None:
        """Goes on behind `step`."""
        from torch.utils.tensorboard import SummaryWriter

        self.close()
        self.writer = SummaryWriter(self.folder, purge_step=step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One point of every curve."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is left."""
        if self.writer is not None:
            self.writer.close()


class WeightsAndBiases:
    """A run of a Weights & Biases project, the same one whenever the training goes on; its files lie in RUN/wandb.

    WANDB_MODE=offline keeps everything on the disk. Raises ConfigError where the package is missing.
    """

    def __init__(self, run_dir: Path, config: TrainConfig):
        try:
            import wandb
        except ImportError:
            raise ConfigError("wandb: the package is not installed; pip install 'goal_ray[wandb]'") from None
        number = hashlib.sha256(str(run_dir).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=config.wandb,
            id=number,
            name=config.name,
            dir=str(run_dir),
            config=to_tree(config),
            resume="allow",
            settings=wandb.Settings(silent=True, console="off", save_code=False),
        )
        # wandb's own counter only rises, but a run that goes on from a checkpoint repeats steps.
        self.run.define_metric("*", step_metric="step")

    def rewind(self, step: int) -> None:
        """Nothing: the curves are drawn over "step", where the repeated points lie on the earlier ones."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """One point of every curve."""
        self.run.log({**values, "step": step})

    def close(self) -> None:
        """Writes what is left."""
        self.run.finish()


def open_loggers(run_dir: Path, config: TrainConfig) -> list[Logger]:
    """The loggers that a run asks for."""
    loggers: list[Logger] = [TensorBoard(run_dir)]
    if config.wandb is not None:
        loggers.append(WeightsAndBiases(run_dir, config))
    return loggers
