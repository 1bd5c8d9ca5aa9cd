"""Configs are typed; anything unknown or impossible is refused, naming the key."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import pytest
from pydantic import Field

from goal_ray.config import build_config, describe, load_config, parse_yaml, strict, to_tree, to_yaml
from goal_ray.errors import ConfigError
from goal_ray.lism.config import LismConfig
from goal_ray.train.config import TrainConfig


@strict
@dataclass(frozen=True)
class Apple:
    """An apple.

    sweetness: from 0 to 1
    """

    name: Literal["apple"] = "apple"
    sweetness: float = 0.5


@strict
@dataclass(frozen=True)
class Pear:
    """A pear."""

    name: Literal["pear"] = "pear"
    stem_mm: int = 3

    def __post_init__(self) -> None:
        if self.stem_mm < 0:
            raise ValueError("stem_mm must not be negative")


@strict
@dataclass(frozen=True)
class Basket:
    """A basket.

    fruit: what is in it
    lid: whether it closes
    size: width and height,
        in cm
    """

    fruit: Annotated[Apple | Pear, Field(discriminator="name")] = field(default_factory=Apple)
    lid: Literal["open", "shut"] = "open"
    size: tuple[int, int] = (10, 20)


def test_overrides_win_over_the_file_and_the_file_over_defaults(tmp_path):
    path = tmp_path / "basket.yaml"
    path.write_text("fruit: {name: pear, stem_mm: 5}\nlid: shut\n")
    basket = load_config(Basket, path, ["fruit.stem_mm=7", "size=[1, 2]"])
    assert basket == Basket(Pear(stem_mm=7), "shut", (1, 2))


def test_yamls_exponents_without_a_dot_are_numbers():
    assert load_config(Basket, overrides=["fruit.name=apple", "fruit.sweetness=5e-6"]).fruit.sweetness == 5e-6


def test_a_tagged_section_keeps_its_default_tag():
    assert load_config(Basket, overrides=["fruit.sweetness=1"]).fruit == Apple(sweetness=1)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("colour=red", ["colour", "unknown key", "fruit, lid, size"]),
        ("fruit.stem_mm=3", ["fruit", "stem_mm", "unknown key", "sweetness"]),
        ("lid=ajar", ["lid", "'open' or 'shut'", "ajar"]),
        ("fruit.name=plum", ["fruit.name: 'plum' is unknown; it is one of apple, pear"]),
        ("fruit=pear", ["fruit: this is a section (got 'pear'); set its keys, such as fruit.name"]),
        ("size=[1, two]", ["size.1", "integer"]),
        ("lid", ["section.key=value"]),
        ("lid.colour.shade=1", ["lid.colour.shade: 'lid' is a value, not a section"]),
        ("fruit={name: apple, name: pear}", ["fruit: line 1: the key 'name' stands in line 1 already"]),
    ],
)
def test_a_wrong_override_is_refused_naming_key_and_choices(override, words):
    with pytest.raises(ConfigError) as caught:
        load_config(Basket, overrides=["lid=open", override])
    assert str(caught.value).startswith("command line: ")
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("lid: shut", ["lidd=open"], "command line: lidd: unknown key (did you mean lid?); allowed here: {keys}"),
        ("lidd: shut", ["lid=open"], "{path}: lidd: unknown key (did you mean lid?); allowed here: {keys}"),
        (
            "colour: red",
            ["size=[1, two]"],
            "{path}: colour: unknown key; allowed here: {keys}\n"
            "command line: size.1: Input should be a valid integer, unable to parse string as an integer (got 'two')",
        ),
        ("lid: ajar", ["size=[3, 4]"], "{path}: lid: Input should be 'open' or 'shut' (got 'ajar')"),
        ("lid: ajar", ["lid=wide"], "command line: lid: Input should be 'open' or 'shut' (got 'wide')"),
        ("fruit: {name: pear}", ["fruit.stem_mm=-1"], "command line: fruit: stem_mm must not be negative"),
        ("fruit: {name: pear, stem_mm: -1}", ["lid=shut"], "{path}: fruit: stem_mm must not be negative"),
    ],
)
def test_a_mistake_is_blamed_on_the_place_where_it_stands(tmp_path, text, overrides, message):
    path = tmp_path / "basket.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Basket, path, overrides)
    assert str(caught.value) == message.format(path=path, keys="fruit, lid, size")


def test_a_mistake_in_the_file_that_the_command_line_mends_is_none(tmp_path):
    path = tmp_path / "basket.yaml"
    path.write_text("lid: ajar")
    assert load_config(Basket, path, ["lid=shut"]).lid == "shut"


def test_settings_that_do_not_go_together_are_refused_without_naming_a_section():
    with pytest.raises(ConfigError) as caught:
        load_config(LismConfig, overrides=["min_area=0.9"])
    assert str(caught.value) == "command line: areas must satisfy 0 <= min_area < max_area <= 1"


def test_the_allowed_keys_are_listed_once_for_a_section_of_several_mistakes():
    with pytest.raises(ConfigError) as caught:
        load_config(Basket, overrides=["fruit.sweet=1", "fruit.colour=red", "laid=open"])
    assert str(caught.value).splitlines() == [
        "command line:",
        "  fruit.sweet: unknown key (did you mean sweetness?)",
        "  fruit.colour: unknown key; allowed here: name, sweetness",
        "  laid: unknown key (did you mean lid?); allowed here: fruit, lid, size",
    ]


@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        ("lid: open\nsize: [1, 2]\nlid: shut\n", 3, "lid", 1),
        ("lid: open\nfruit:\n  name: pear\n  stem_mm: 1\n  'stem_mm': 2\n", 5, "stem_mm", 4),
    ],
)
def test_a_key_that_stands_twice_in_a_file_is_refused_with_its_line(tmp_path, text, line, key, first):
    path = tmp_path / "basket.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Basket, path)
    assert str(caught.value) == f"{path}, line {line}: the key '{key}' stands in line {first} already; keep one"


def test_a_merged_mapping_may_be_overridden_key_by_key():
    merged = parse_yaml("a: &a {x: 1, y: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: [*b, *a], x: 3}")
    assert merged == {"a": {"x": 1, "y": 1}, "b": {"x": 2, "y": 1}, "c": {"x": 3, "y": 1}}


def test_an_impossible_value_is_refused_with_the_classs_own_words():
    with pytest.raises(ConfigError, match="stem_mm must not be negative"):
        load_config(Basket, overrides=["fruit.name=pear", "fruit.stem_mm=-1"])


@pytest.mark.parametrize(("text", "error"), [("a: [", "YAML"), ("- 1", "mapping"), (None, "no such config file")])
def test_a_file_that_is_no_mapping_is_refused(tmp_path, text, error):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=error):
        load_config(Basket, path)


def test_a_stored_config_loads_back_equal(tmp_path):
    basket = Basket(Pear(stem_mm=9), "shut", (3, 4))
    path = tmp_path / "x.yaml"
    path.write_text(to_yaml(basket))
    assert load_config(Basket, path) == basket
    assert build_config(Basket, to_tree(basket), "tree") == basket


def test_help_names_every_key_with_default_and_meaning():
    text = describe(Basket)
    for words in ("fruit.sweetness = 0.5", "from 0 to 1", "A pear.", "lid = open", "[open | shut]", "height, in cm"):
        assert words in text


@pytest.mark.parametrize("cls", [TrainConfig, LismConfig])
def test_every_key_of_the_real_configs_is_explained(cls):
    lines = describe(cls).splitlines()
    keys = [number for number, line in enumerate(lines) if line.startswith("  ") and not line.startswith("      ")]
    unexplained = [
        lines[number] for number in keys if number + 1 == len(lines) or not lines[number + 1].startswith("      ")
    ]
    assert not [line for line in unexplained if ".name = " not in line]


@pytest.mark.parametrize(("columns", "widest"), [(60, 60), (100, 100), (300, 120)])
def test_explanations_take_the_terminals_width_as_far_as_it_can_be_read(monkeypatch, columns, widest):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = [line for line in describe(TrainConfig).splitlines() if " = " not in line]
    assert widest - 5 <= max(map(len, lines)) <= widest


@pytest.mark.parametrize("text", ["2024-02-30", "!!int abc", "!!timestamp abc", "!!bool abc", "[" * 3000])
def test_a_value_that_makes_no_sense_to_yaml_is_refused_naming_its_place(tmp_path, text):
    with pytest.raises(ConfigError, match="seed"):
        load_config(TrainConfig, None, [f"seed={text}"])
    (tmp_path / "a.yaml").write_text(f"seed: {text}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: not readable as YAML"):
        load_config(TrainConfig, tmp_path / "a.yaml")
