"""The token-similarity loss (TSL) of GOAL: `tsl_loss`, one contract with several implementations."""

from kernels.tsl.op import tsl_loss
from kernels.tsl.reference import TslResult

__all__ = ["TslResult", "tsl_loss"]
