"""How many cores this process may use; in a container those are fewer than the machine's."""

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Cores by the process's affinity and its control group's quota, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(cgroups)
    return affinity if quota is None else max(1, min(affinity, math.floor(quota)))


def cpu_quota(cgroups: Path) -> float | None:
    """Cores' worth of time that the control group grants, of version 2 or 1; None where there is no limit."""
    try:
        if (file := cgroups / "cpu.max").exists():
            quota, period = file.read_text().split()
        else:
            quota, period = ((cgroups / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        granted = float(quota) / float(period)
    except (OSError, ValueError):  # no such group, or the word "max"
        return None
    return granted if granted > 0 else None
