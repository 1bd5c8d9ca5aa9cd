"""COCO-style JSON: `images` with id and file_name, `annotations` with image_id and caption. Held in memory whole."""

import json
from collections import defaultdict
from collections.abc import Hashable, Iterator
from functools import partial
from typing import Any, Literal

from goal_ray.errors import StageError
from goal_ray.shards.sources.candidate import (
    Candidate,
    Found,
    Unusable,
    caption_text,
    fields_json,
    one_caption,
    stem_and_suffix,
    tar_key,
)
from goal_ray.shards.sources.lists import read_listed
from goal_ray.storage import read_bytes


class CocoSource:
    """The images of a COCO file, in its order; the key is the file name without its suffix."""

    in_folders = False

    def __init__(self, url: str, images: str, several: Literal["join", "first"]):
        self.parts = [url]
        self._images = images
        self._several = several

    def candidates(self, part: str) -> Iterator[Candidate]:
        """One candidate per image, then one for every annotation that has no image."""
        images, annotations = read_coco(part)
        captions: defaultdict[Any, list[Any]] = defaultdict(list)
        for number, annotation in enumerate(annotations):
            image_id = annotation.get("image_id")
            if not can_be_id(image_id):
                yield Candidate("", f"annotations[{number}]", Unusable("bad row", f"it has image_id = {image_id!r}"))
                continue
            captions[image_id].append(annotation.get("caption"))
        for number, image in enumerate(images):
            origin = f"images[{number}]"
            name = image.get("file_name")
            if not isinstance(name, str) or not name:
                yield Candidate("", origin, Unusable("bad row", f"it has file_name = {name!r}"))
                continue
            image_id = image.get("id")
            if not can_be_id(image_id):
                yield Candidate("", f"{origin} {name}", Unusable("bad row", f"it has id = {image_id!r}"))
                continue
            load = partial(self._load, name, captions.pop(image_id, []), image)
            yield Candidate(tar_key(stem_and_suffix(name)[0]), f"{origin} {name}", load)
        for image_id, lost in captions.items():
            reason = f"{len(lost)} annotations name the image_id {image_id!r}, which is not among the images left"
            yield Candidate("", f"image_id {image_id!r}", Unusable("no picture", reason))

    def _load(self, name: str, told: list[Any], image: dict[str, Any]) -> Found:
        captions = [text for text in map(caption_text, told) if text is not None]
        fields = {name: value for name, value in image.items() if name != "file_name"}
        if len(captions) > 1:
            fields["captions"] = captions
        return Found(read_listed(self._images, name), one_caption(captions, self._several), fields_json(fields))


def can_be_id(value: Any) -> bool:
    """Whether a value can say which image an annotation is of."""
    return value is not None and isinstance(value, Hashable)


def read_coco(url: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The images and the annotations of a COCO file. Raises StageError for anything else."""
    try:
        tree = json.loads(read_bytes(url))
    except (ValueError, RecursionError) as error:
        raise StageError(f"{url}: not JSON: {error}; a list with a JSON object per line is named .jsonl") from None
    images, annotations = (list_of_objects(tree, name, url) for name in ("images", "annotations"))
    if annotations and not any("caption" in annotation for annotation in annotations):
        raise StageError(f"{url}: the annotations hold no caption; COCO's captions are in captions_*.json")
    return images, annotations


def list_of_objects(tree: Any, name: str, url: str) -> list[dict[str, Any]]:
    """The list `name` of a COCO file. Raises StageError where it is none."""
    found = tree.get(name) if isinstance(tree, dict) else None
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise StageError(f"{url}: not a COCO file: it needs lists of objects named `images` and `annotations`")
    return found
