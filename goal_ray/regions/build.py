"""From a proposer's settings to the proposer."""

from goal_ray.precision import full_fp32
from goal_ray.regions.config import DetectorConfig, FelzenszwalbConfig, GridConfig, ProposerConfig, SamConfig
from goal_ray.regions.protocol import RegionProposer
from goal_ray.regions.weights import DETECTOR_ADVICE, OFFICIAL, SAM_ADVICE, check_sum, find_checkpoint, torchvision_sum


def build_proposer(config: ProposerConfig, device: str = "cpu") -> RegionProposer:
    """The proposer, its model loaded to the device; grid and felzenszwalb run on the CPU whatever the device.

    Raises ModelError for a missing, changed or unfitting checkpoint.
    """
    # Each is imported where it is built, with the libraries that it computes with and no others.
    match config:
        case FelzenszwalbConfig():
            from goal_ray.regions.felzenszwalb import FelzenszwalbProposer

            return FelzenszwalbProposer(config)
        case GridConfig():
            from goal_ray.regions.grid import GridProposer

            return GridProposer(config)
        case SamConfig():
            from goal_ray.regions.sam import SamProposer
            from goal_ray.regions.sam_weights import load_sam

            path = find_checkpoint(config.checkpoint, SAM_ADVICE)
            check_sum(path, config.sha256 or OFFICIAL.get(path.name))
            full_fp32()
            return SamProposer(load_sam(path).to(device), config)
        case DetectorConfig():
            from goal_ray.regions.detector import DetectorProposer, load_detector

            path = find_checkpoint(config.checkpoint, DETECTOR_ADVICE)
            check_sum(path, config.sha256 or torchvision_sum(path))
            full_fp32()
            return DetectorProposer(load_detector(config.model, config.classes, path).to(device), config)
