"""The words for a scene: a sentence per object, sentences about the scene as a whole, and who says what."""

from dataclasses import dataclass

import numpy as np
from numpy.random import Generator

from goal_ray.scenes.layout import BACKGROUNDS, Scene, SceneObject

SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized", "mid-sized"),
    "large": ("large", "big", "huge"),
}
PATTERN_PHRASES = {
    "solid": ("in one flat tone", "without any pattern", "in plain colour"),
    "striped": ("with {accent} stripes", "striped in {accent}", "covered in {accent} stripes"),
    "dotted": ("with {accent} dots", "dotted in {accent}", "covered in {accent} spots"),
    "checkered": ("with {accent} checks", "checkered in {accent}", "covered in {accent} checks"),
    "two-tone": ("with one half {accent}", "half {accent}", "two-toned in {accent}"),
}
SHAPE_WORDS = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star", "five-pointed star"),
    "cross": ("cross", "plus sign"),
    "heart": ("heart",),
}
PLACE_WORDS = {
    "top left": ("at the top left", "in the upper left corner"),
    "top centre": ("at the top centre", "in the upper middle"),
    "top right": ("at the top right", "in the upper right corner"),
    "centre left": ("at the centre left", "halfway down the left side"),
    "centre": ("in the centre", "in the very middle"),
    "centre right": ("at the centre right", "halfway down the right side"),
    "bottom left": ("at the bottom left", "in the lower left corner"),
    "bottom centre": ("at the bottom centre", "in the lower middle"),
    "bottom right": ("at the bottom right", "in the lower right corner"),
}
NOUN_PHRASES = (
    "{size} {colour} {shape} {pattern}",
    "{colour} {shape} of {plain_size} size {pattern}",
    "{colour} {shape} {pattern}",
)
PLACED_TEMPLATES = (
    "{thing} sits {place}.",
    "{thing} can be seen {place}.",
    "{thing} has been placed {place}.",
    "{thing} rests {place} of the picture.",
    "{thing} is what you find {place}.",
    "{place} there is {thing}.",
    "{place}, you can see {thing}.",
    "{place} of the image lies {thing}.",
    "the picture shows {thing} {place}.",
    "look {place} for {thing}.",
    "we notice {thing} {place}.",
    "somebody has drawn {thing} {place}.",
    "the {shape} {place} is {size} and {colour}, {pattern}.",
    "the {shape} {place} is {colour}, {pattern}.",
)
# Short captions say what things are, as a picture's alt text does: no size, and mostly no place. Those of crops name
# places too: else a CLIP may take places for signs of whole scenes, and match sentences that name one so.
SHORT_NOUN_PHRASES = ("{colour} {shape} {pattern}",)
SHORT_TEMPLATES = (
    "{thing}.",
    "this is {thing}.",
    "here we see {thing}.",
    "a picture of {thing}.",
    "the {shape} is {colour}, {pattern}.",
    "{thing} {place}.",
    "{place} there is {thing}.",
    "the {shape} {place} is {colour}, {pattern}.",
)

TEXTURE_WORDS = {
    "plain": "plain",
    "fading": "fading",
    "cloudy": "cloudy",
    "ruled": "finely ruled",
    "tiled": "faintly tiled",
    "grainy": "grainy",
}
BACKGROUND_TEMPLATES = (
    "the background is {texture} and {colour}.",
    "behind everything lies a {texture} surface in {colour}.",
    "all of this is set on a {texture} {colour} ground.",
    "a {texture} {colour} backdrop fills the rest.",
)
COUNT_TEMPLATES = (
    "there {are} {count} {shapes} in total.",
    "the picture holds {count} {shapes}.",
    "altogether {count} {shapes} can be counted.",
)
MOODS = {
    True: ("the mood is light and airy.", "everything looks bright and friendly."),
    False: ("the mood is dark and calm.", "everything looks dim and quiet."),
}
LAYOUTS = {
    "x": ("the left side holds more than the right.", "the right side holds more than the left."),
    "y": ("more is going on above than below.", "more is going on below than above."),
}
BALANCED = ("left and right are well balanced.", "the arrangement is balanced from side to side.")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Sentence:
    """One sentence of a caption: text[start:end], in characters, and the object it is about (None: the whole scene)."""

    start: int
    end: int
    object: int | None


def write_caption(scene: Scene, rng: Generator, short: bool) -> tuple[str, list[Sentence]]:
    """The caption and its sentences in reading order.

    A `short` one is like alt text: each object's shape, colour and pattern, sometimes its place, and nothing else.
    """
    said: list[tuple[str, int | None]] = [
        (object_sentence(thing, rng, short), index) for index, thing in enumerate(scene.objects)
    ]
    if not short:
        said.extend((text, None) for text in scene_sentences(scene, rng))
    said = [said[index] for index in rng.permutation(len(said))]
    sentences, start = [], 0
    for text, about in said:
        sentences.append(Sentence(start, start + len(text), about))
        start += len(text) + 1
    return " ".join(text for text, _ in said), sentences


def object_sentence(thing: SceneObject, rng: Generator, short: bool) -> str:
    """One sentence about one object."""
    words = {
        "size": pick(rng, SIZE_WORDS[thing.size]),
        "plain_size": thing.size,
        "colour": thing.colour,
        "pattern": pick(rng, PATTERN_PHRASES[thing.pattern]).format(accent=thing.accent),
        "shape": pick(rng, SHAPE_WORDS[thing.shape]),
        "place": pick(rng, PLACE_WORDS[thing.place]),
    }
    words["thing"] = with_article(pick(rng, SHORT_NOUN_PHRASES if short else NOUN_PHRASES).format(**words))
    return capitalised(pick(rng, SHORT_TEMPLATES if short else PLACED_TEMPLATES).format(**words))


def scene_sentences(scene: Scene, rng: Generator) -> list[str]:
    """One to three sentences about the background, the number of objects, the mood and the layout."""
    count = len(scene.objects)
    bright = bool(np.mean(BACKGROUNDS[scene.background]) > 150)
    candidates = [
        pick(rng, BACKGROUND_TEMPLATES).format(texture=TEXTURE_WORDS[scene.texture], colour=scene.background),
        pick(rng, COUNT_TEMPLATES).format(
            count=NUMBERS[count], shapes="shape" if count == 1 else "shapes", are="is" if count == 1 else "are"
        ),
        pick(rng, MOODS[bright]),
        layout_sentence(scene, rng),
    ]
    chosen = rng.permutation(len(candidates))[: rng.integers(1, 4)]
    return [capitalised(candidates[index]) for index in chosen]


def layout_sentence(scene: Scene, rng: Generator) -> str:
    """Which side holds more objects, by their places; or that neither does."""
    axis, before, after = [("x", "left", "right"), ("y", "top", "bottom")][int(rng.integers(2))]
    lead = sum((before in thing.place) - (after in thing.place) for thing in scene.objects)
    if lead == 0:
        return pick(rng, BALANCED) if axis == "x" else "above and below hold equally much."
    return LAYOUTS[axis][0 if lead > 0 else 1]


def pick(rng: Generator, options: tuple[str, ...]) -> str:
    """One of the options."""
    return options[int(rng.integers(len(options)))]


def with_article(phrase: str) -> str:
    """ "an orange ring", "a red ring"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def capitalised(text: str) -> str:
    """The first letter in upper case, the rest as it is."""
    return text[0].upper() + text[1:]
