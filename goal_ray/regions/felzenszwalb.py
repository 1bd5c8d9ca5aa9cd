"""Classical regions without weights: Felzenszwalb's superpixels, merged bottom-up as selective search does.

A striped or dotted object is no single superpixel; its parts are found again as one region on the way up the tree.
Sources: Felzenszwalb & Huttenlocher 2004 (superpixels); Uijlings et al. 2013 (merging by colour, size and fill).
"""

import heapq
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped]

from goal_ray.images import shrink
from goal_ray.regions.config import FelzenszwalbConfig
from goal_ray.regions.protocol import RegionProposer, Regions, all_from

BINS = 8  # of the histogram, per channel

Box = tuple[int, int, int, int]


class FelzenszwalbProposer(RegionProposer):
    """Superpixels and their merges. Scores are 1 - the similarity of colour to the most similar neighbour."""

    def __init__(self, config: FelzenszwalbConfig):
        from skimage.segmentation import felzenszwalb

        self.config = config
        self.superpixels = felzenszwalb

    def propose(self, images: Sequence[np.ndarray]) -> list[Regions]:
        """Every superpixel and every merge of each image, small ones and the whole image among them."""
        return [self.segment(image) for image in images]

    def segment(self, image_HW3: np.ndarray) -> Regions:
        """The regions of one image."""
        height, width = image_HW3.shape[:2]
        small_HW3 = np.asarray(shrink(Image.fromarray(image_HW3), self.config.side_px))
        small_height, small_width = small_HW3.shape[:2]
        labels_HW = self.superpixels(
            small_HW3, scale=self.config.scale, sigma=self.config.sigma, min_size=self.config.min_size
        )
        found = merge_tree(small_HW3, labels_HW)
        scale = np.array([width / small_width, height / small_height], np.float32)
        return replace(found, boxes_px=found.boxes_px * np.tile(scale, 2), areas_px=found.areas_px * scale.prod())


def merge_tree(image_HW3: np.ndarray, labels_HW: np.ndarray) -> Regions:
    """The segments of a label map (integers from 0, none missing), and every region that merging them passes through.

    Neighbours merge most similar first, where similarity is colour + size + fill (Uijlings et al. 2013, section 3.2):
    the overlap of their colour histograms, preferring small ones, and those that fill their common box.
    """
    total = labels_HW.size
    sizes: list[int] = np.bincount(labels_HW.ravel()).tolist()
    histograms = list(colour_histograms(image_HW3, labels_HW, len(sizes)))
    boxes: list[Box] = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels_HW + 1)]
    neighbours: dict[int, set[int]] = {label: set() for label in range(len(sizes))}
    likeness = [0.0] * len(sizes)
    queue: list[tuple[float, int, int]] = []

    def meet(a: int, b: int) -> None:
        neighbours[a].add(b)
        neighbours[b].add(a)
        colour = float(np.minimum(histograms[a], histograms[b]).sum())
        likeness[a] = max(likeness[a], colour)
        likeness[b] = max(likeness[b], colour)
        x0, y0, x1, y1 = union(boxes[a], boxes[b])
        together = sizes[a] + sizes[b]
        similarity = colour + (1 - together / total) + (1 - ((x1 - x0) * (y1 - y0) - together) / total)
        heapq.heappush(queue, (-similarity, a, b))

    for a, b in touching(labels_HW):
        meet(a, b)
    while queue:
        _, a, b = heapq.heappop(queue)
        if a not in neighbours or b not in neighbours:
            continue
        around = (neighbours.pop(a) | neighbours.pop(b)) - {a, b}
        merged = len(sizes)
        sizes.append(sizes[a] + sizes[b])
        boxes.append(union(boxes[a], boxes[b]))
        histograms.append((histograms[a] * sizes[a] + histograms[b] * sizes[b]) / sizes[merged])
        likeness.append(0.0)
        neighbours[merged] = set()
        for other in around:
            neighbours[other] -= {a, b}
            meet(merged, other)
    scores_R = 1 - np.array(likeness, np.float32)
    return Regions(
        np.array(boxes, np.float32), scores_R, np.array(sizes, np.float32), all_from("felzenszwalb", len(boxes))
    )


def colour_histograms(image_HW3: np.ndarray, labels_HW: np.ndarray, count: int) -> np.ndarray:
    """Colour histogram of each of the `count` segments, (count, 3 * BINS) float32, each row's sum 1."""
    bins_HW3 = image_HW3 // (256 // BINS) + BINS * np.arange(3)
    flat = labels_HW[..., None] * (3 * BINS) + bins_HW3
    counts = np.bincount(flat.ravel(), minlength=count * 3 * BINS).reshape(count, 3 * BINS)
    return (counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)


def touching(labels_HW: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of different labels that share a pixel edge, each once, sorted."""
    beside = np.stack([labels_HW[:, :-1].ravel(), labels_HW[:, 1:].ravel()])
    below = np.stack([labels_HW[:-1].ravel(), labels_HW[1:].ravel()])
    pairs = np.sort(np.concatenate([beside, below], axis=1), axis=0)
    return [(int(a), int(b)) for a, b in np.unique(pairs[:, pairs[0] != pairs[1]], axis=1).T]


def union(a: Box, b: Box) -> Box:
    """The smallest box around both."""
    return min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])
