"""fp32 means fp32, whatever the process was started with."""

import os
import subprocess
import sys


def test_the_environments_tf32_is_switched_off():
    """In a process of its own: torch reads the environment once."""
    program = (
        "import torch\n"
        "from goal_ray.precision import full_fp32\n"
        "before = torch.get_float32_matmul_precision()\n"
        "full_fp32()\n"
        "print(before, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32)"
    )
    environment = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == ["high", "highest", "False"]
