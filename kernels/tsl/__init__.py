"""The token-similarity loss (TSL) of GOAL: `tsl_loss`, one contract with several implementations."""

from kernels.tsl.op import choose_backend, tsl_loss
from kernels.tsl.reference import TslResult

__all__ = ["TslResult", "choose_backend", "tsl_loss"]
