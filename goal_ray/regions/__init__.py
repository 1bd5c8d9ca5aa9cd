"""Region proposers, all behind one protocol. A further one is a file here, its settings and a case in `build.py`."""

from goal_ray.regions.build import build_proposer
from goal_ray.regions.config import DetectorConfig, FelzenszwalbConfig, GridConfig, ProposerConfig, SamConfig
from goal_ray.regions.protocol import RegionProposer, Regions, usable

__all__ = [
    "DetectorConfig",
    "FelzenszwalbConfig",
    "GridConfig",
    "ProposerConfig",
    "RegionProposer",
    "Regions",
    "SamConfig",
    "build_proposer",
    "usable",
]
