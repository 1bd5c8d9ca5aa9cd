"""Region proposers, all behind one protocol. A further one is a file here and a name in `ProposerConfig`."""

from typing import Annotated

from pydantic import Field

from goal_ray.regions.detector import DetectorConfig
from goal_ray.regions.felzenszwalb import FelzenszwalbConfig
from goal_ray.regions.grid import GridConfig
from goal_ray.regions.protocol import RegionProposer, Regions, usable
from goal_ray.regions.sam import SamConfig

ProposerConfig = Annotated[FelzenszwalbConfig | GridConfig | SamConfig | DetectorConfig, Field(discriminator="name")]

__all__ = [
    "DetectorConfig",
    "FelzenszwalbConfig",
    "GridConfig",
    "ProposerConfig",
    "RegionProposer",
    "Regions",
    "SamConfig",
    "usable",
]
