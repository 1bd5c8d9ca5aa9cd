"""The benchmark of the token-similarity loss: `python -m kernels.benchmark`."""

import os

import torch

# Triton takes its interpreter by this variable alone, when a kernel is first imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
