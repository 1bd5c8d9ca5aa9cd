"""Small holes and islands of masks, as `segment_anything.utils.amg.remove_small_regions` treats them."""

import numpy as np
import torch
from skimage.measure import label
from torch import Tensor


def clean(logits_RHW: Tensor, least_cells: float) -> tuple[Tensor, Tensor]:
    """Logits whose masks have no hole and no island of fewer cells than that, and which of them changed (R,).

    A cell that changes sides keeps the size of its logit, so that the mask's edges elsewhere stay where they are. Of a
    mask of small islands alone, the largest stays.
    """
    masks_RHW = (logits_RHW > 0).cpu().numpy()
    flips_RHW = np.zeros_like(masks_RHW)
    for flips_HW, mask_HW in zip(flips_RHW, masks_RHW, strict=True):
        flips_HW[:] = clean_mask(mask_HW, least_cells) ^ mask_HW
    flipped_RHW = torch.from_numpy(flips_RHW).to(logits_RHW.device)
    # A logit of 0, outside the mask, has no other side.
    other_RHW = torch.where(logits_RHW == 0, 1e-3, -logits_RHW)
    return torch.where(flipped_RHW, other_RHW, logits_RHW), flipped_RHW.flatten(1).any(1)


def clean_mask(mask_HW: np.ndarray, least_cells: float) -> np.ndarray:
    """The mask without its small holes, then without its small islands; cells that touch at a corner are connected."""
    filled_HW = mask_HW | small_parts(~mask_HW, least_cells)
    islands_HW = small_parts(filled_HW, least_cells)
    if islands_HW.any() and (islands_HW == filled_HW).all():
        parts_HW = label(filled_HW, connectivity=2)
        return parts_HW == 1 + np.bincount(parts_HW.ravel())[1:].argmax()
    return filled_HW & ~islands_HW


def small_parts(mask_HW: np.ndarray, least_cells: float) -> np.ndarray:
    """The connected parts of fewer cells than that."""
    parts_HW = label(mask_HW, connectivity=2)
    small = np.bincount(parts_HW.ravel()) < least_cells
    small[0] = False
    return small[parts_HW]
