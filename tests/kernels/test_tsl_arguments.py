"""Arguments that `tsl_loss` refuses, and what it says of the backend it takes."""

import math
import subprocess
import sys

import pytest
import torch
from tsl_cases import random_case

from kernels.tsl import tsl_loss


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (4, 4)}, "20 tokens do not fill a 4×4 grid"),
        ({"grid": (-4, -5)}, "do not fill"),
        ({"first_token": 1}, "20 tokens do not fill a 4×5 grid from token 1 on"),
        ({"first_token": -4, "grid": (4, 6)}, "do not fill"),
        ({"tokens_BND": torch.zeros(3, 20)}, r"tokens must be \(B, N, D\)"),
        ({"tokens_BND": torch.zeros(3, 20, 7, dtype=torch.int64)}, "tokens must be of a float dtype"),
        ({"boxes_M4": torch.zeros(9, 3)}, "boxes must have shape"),
        ({"boxes_M4": torch.zeros(())}, "boxes must have shape"),
        ({"boxes_M4": torch.zeros(9, 4, dtype=torch.int64)}, "boxes must be of a float dtype"),
        ({"boxes_M4": torch.full((9, 4), math.nan)}, "box 0 is not finite"),
        ({"boxes_M4": torch.tensor([[0.0, 0, 1, 1]] * 8 + [[0.0, 0, math.inf, 1]])}, "box 8 is not finite"),
        ({"sample_index_M": torch.zeros(8, dtype=torch.int64)}, "sample_index must have shape"),
        ({"sample_index_M": torch.zeros(9)}, "sample_index must be int32 or int64"),
        ({"sample_index_M": torch.tensor([0] * 8 + [-1])}, r"sample_index\[8\] is -1"),
        ({"sample_index_M": torch.tensor([0] * 8 + [3])}, "batch has 3 samples"),
        ({"ln_weight_D": torch.zeros(6)}, "ln_weight must have shape"),
        ({"ln_bias_D": torch.zeros(7, device="meta")}, "ln_bias is on meta"),
        ({"proj_DE": torch.zeros(6, 6)}, "proj must have shape"),
        ({"proj_DE": None}, "target must have shape"),
        ({"target_ME": torch.zeros(9)}, "must have shape"),
        ({"mode": "center"}, "choose one of coverage, touch"),
        ({"eps": 0.0}, "eps must be > 0"),
        ({"backend": "cuda"}, "choose one of auto, reference, eager"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        tsl_loss(**{**random_case(17, device="cpu"), **change})


def test_the_chosen_backend_is_logged_once():
    program = (
        "import logging, sys, torch; logging.basicConfig(level='INFO', stream=sys.stdout)\n"
        "from kernels.tsl import tsl_loss\n"
        "one = torch.ones(1, 1, 2)\n"
        "for _ in range(3): tsl_loss(one, torch.ones(1, 4), torch.tensor([0]), (1, 1), None, None, None, one[0])\n"
        "unwanted = {'goal_ray', 'ray', 'open_clip', 'deepspeed', 'torchvision', 'PIL'} & set(sys.modules)\n"
        "print('unwanted:', sorted(unwanted))"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.count("token-similarity loss on cpu: eager backend") == 1
    assert "unwanted: []" in output  # the kernels need torch alone
