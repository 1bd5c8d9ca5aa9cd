"""Typed configs: a frozen dataclass ← YAML file ← `section.key=value` overrides. Anything unknown is refused.

A config class is a plain frozen dataclass with a docstring whose lines `name: what it does` document its fields.
"""

import dataclasses
import json
import re
import shutil
import textwrap
import typing
from collections.abc import Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from goal_ray.errors import ConfigError

T = TypeVar("T")
UNKNOWN_KEY = ("unexpected_keyword_argument", "extra_forbidden")  # pydantic's types of error
WIDEST_HELP = 120


def strict(cls: type) -> type:
    """Class decorator: a config dataclass that refuses unknown keys when it is loaded."""
    cls.__pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return cls


def check_custom_resources(key: str, resources: Mapping[str, float]) -> None:
    """For __post_init__: raises ValueError for amounts of what Ray itself counts, or of nothing."""
    for name, amount in resources.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory") or amount <= 0:
            raise ValueError(f"{key} holds amounts above 0 of custom resources, not {name}: {amount:g}")


def load_config(cls: type[T], path: str | Path | None = None, overrides: Sequence[str] = ()) -> T:
    """Builds `cls` from its defaults, then a YAML file, then overrides such as `optimizer.lr=1e-5`.

    Raises ConfigError naming the key, what it may be, and whether file or command line is to blame, before any work is
    done.
    """
    stored = {} if path is None else read_yaml(path)
    tree = deepcopy(stored)
    for override in overrides:
        set_override(tree, override)
    try:
        return validate(cls, tree)
    except ValidationError as error:
        # What is wrong with the file alone is the file's fault, whatever else the command line says.
        old = set() if path is None else {explain(cls, item) for item in mistakes(cls, stored)}
        found: dict[bool, list[Any]] = {True: [], False: []}
        for item in error.errors():
            found[explain(cls, item) in old].append(item)
        sources = {str(path): found[True], "command line": found[False]}
        blamed = [report(cls, source, items) for source, items in sources.items() if items]
        raise ConfigError("\n".join(blamed)) from None


def build_config(cls: type[T], tree: dict[str, Any], source: str) -> T:
    """Builds `cls` from a tree of plain values. Raises ConfigError that blames `source`."""
    try:
        return validate(cls, tree)
    except ValidationError as error:
        raise ConfigError(report(cls, source, error.errors())) from None


def validate(cls: type[T], tree: dict[str, Any]) -> T:
    """The config of a tree of plain values. Raises pydantic's ValidationError."""
    return TypeAdapter(cls).validate_python(with_default_tags(cls, tree))


def mistakes(cls: type, tree: dict[str, Any]) -> list[Any]:
    """pydantic's errors about a tree; none where it is right."""
    try:
        validate(cls, tree)
    except ValidationError as error:
        return list(error.errors())
    return []


def with_default_tags(cls: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """The tree, with the default's `name` put into every tagged section that does not name its kind."""
    filled = dict(tree)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        section, options = tree.get(field.name), dataclass_options(hints[field.name])
        if not isinstance(section, dict):
            continue
        if len(options) == 1:
            filled[field.name] = with_default_tags(options[0], section)
        elif options and field.default_factory is not dataclasses.MISSING:
            filled[field.name] = {"name": field.default_factory().name, **section}
    return filled


class RepeatedKey(yaml.YAMLError):
    """A mapping says a key twice; YAML's own loader would take the last without a word."""


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise RepeatedKey(
                        f"line {line}: the key {key.value!r} stands in line {lines[name]} already; keep one"
                    )
                lines[name] = line
        return node


def parse_yaml(text: str) -> Any:
    """The plain values that a YAML text stands for. Raises yaml.YAMLError, RepeatedKey among others."""
    try:
        return yaml.load(text, _Loader)
    # Of what looks like a date or says to be a number, and is none; of brackets in brackets in ...
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise yaml.YAMLError(f"a value makes no sense: {error}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError for a missing file, bad YAML, or anything but a mapping."""
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "; settings come behind a config file" if "=" in str(path) else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except RepeatedKey as error:
        raise ConfigError(f"{path}, {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, not a {type(tree).__name__}")
    return tree


def set_override(tree: dict[str, Any], override: str) -> None:
    """Sets what an override such as `optimizer.lr=1e-5` says. Raises ConfigError for one that says nothing."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"command line: {override!r} is not of the form section.key=value")
    try:
        value = parse_yaml(text)
    except RepeatedKey as error:
        raise ConfigError(f"command line: {key}: {error}") from None
    except yaml.YAMLError:
        value = text
    set_dotted(tree, key.split("."), value)


def set_dotted(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets tree[a][b][c] = value for keys a, b, c, making the mappings on the way."""
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"command line: {'.'.join(keys)}: {key!r} is a value, not a section")
        tree = child
    tree[keys[-1]] = value


def report(cls: type, source: str, items: Sequence[Any]) -> str:
    """What is wrong with the settings of a source, by pydantic's errors; a section's keys are listed once."""
    last_unknown = {item["loc"][:-1]: item for item in items if item["type"] in UNKNOWN_KEY}
    lines = []
    for item in items:
        listed = last_unknown.get(item["loc"][:-1]) is item
        known = known_keys(cls, item["loc"][:-1]) if listed else []
        lines.append(explain(cls, item) + (f"; allowed here: {', '.join(known)}" if known else ""))
    return f"{source}:" + (f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines))


def explain(cls: type, item: Any) -> str:
    """One readable line for one of pydantic's errors."""
    _, path = locate(cls, item["loc"])
    prefix = f"{'.'.join(path)}: " if path else ""
    if item["type"] in UNKNOWN_KEY:
        near = get_close_matches(path[-1], known_keys(cls, item["loc"][:-1]), 1)
        return f"{prefix}unknown key" + (f" (did you mean {near[0]}?)" if near else "")
    if item["type"] in ("missing", "missing_argument"):
        return f"{prefix}required, but not given"
    given = item.get("input")
    if item["type"] == "union_tag_invalid":
        tag = item["ctx"]["discriminator"].strip("'")
        allowed = item["ctx"]["expected_tags"].replace("'", "")
        return f"{'.'.join([*path, tag])}: {given[tag]!r} is unknown; it is one of {allowed}"
    if item["type"] in ("model_attributes_type", "dataclass_type"):
        known = known_keys(cls, item["loc"])
        example = f", such as {'.'.join([*path, known[0]])}" if known else ""
        return f"{prefix}this is a section (got {given!r}); set its keys{example}"
    message = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(given, dict) or dataclasses.is_dataclass(given) else f" (got {given!r})"
    return f"{prefix}{message}{shown}"


def known_keys(cls: Any, location: Sequence[Any]) -> list[str]:
    """The field names of the config class found by walking pydantic's `location` down from `cls`."""
    hint, _ = locate(cls, location)
    return list(dict.fromkeys(field.name for option in dataclass_options(hint) for field in dataclasses.fields(option)))


def locate(cls: Any, location: Sequence[Any]) -> tuple[Any, list[str]]:
    """What stands at pydantic's `location` below `cls`: its type hint, and its keys as a user writes them.

    pydantic puts the name of a tagged section's class behind that section's key; no user writes it there.
    """
    path = []
    for part in map(str, location):
        options = dataclass_options(cls)
        named = [option for option in options if typing.get_type_hints(option).get("name") and part in names_of(option)]
        if named and len(options) > 1:
            cls = named[0]
            continue
        path.append(part)
        cls = {name: hint for option in options for name, hint in typing.get_type_hints(option).items()}.get(part)
    return cls, path


def names_of(cls: Any) -> tuple[str, ...]:
    """The values a tagged config class allows for its `name`."""
    return tuple(typing.get_args(typing.get_type_hints(cls)["name"]))


def dataclass_options(hint: Any) -> list[Any]:
    """The config classes a type hint allows: itself, or the members of a union."""
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [option for argument in typing.get_args(hint) for option in dataclass_options(argument)]


def to_tree(config: Any) -> dict[str, Any]:
    """The config as plain values, as stored in a run folder; `load_config` reads it back to an equal config."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def to_yaml(config: Any) -> str:
    """The config as YAML text."""
    return yaml.safe_dump(to_tree(config), sort_keys=False, allow_unicode=True)


def fill(text: str, hang: int) -> str:
    """A text broken between words for the terminal, its lines but the first `hang` columns to the right."""
    width = min(WIDEST_HELP, shutil.get_terminal_size().columns)
    return textwrap.fill(text, width, subsequent_indent=" " * hang, break_long_words=False, break_on_hyphens=False)


def describe(cls: type, prefix: str = "") -> str:
    """Help text: the class's own keys, then its sections; a key with its default and its line of the docstring."""
    docs = dict(re.findall(r"^\s*(\w+): (.+(?:\n {8,}.+)*)$", cls.__doc__ or "", re.MULTILINE))
    hints = typing.get_type_hints(cls)
    keys, sections = [], []
    for field in dataclasses.fields(cls):
        name, options = f"{prefix}{field.name}", dataclass_options(hints[field.name])
        for option in options:
            title = section_title(name, field, option, tagged=len(options) > 1)
            sections.append(f"\n{fill(title, 6)}\n{describe(option, f'{name}.')}")
        allowed = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
        if options or len(allowed) == 1:  # the one allowed value is the section's tag, which its title tells
            continue
        default = "(required)" if field.default is dataclasses.MISSING else f"= {to_text(field.default)}"
        if field.default_factory is not dataclasses.MISSING:
            default = f"= {to_text(field.default_factory())}"
        choices = f" [{' | '.join(map(str, allowed))}]" if allowed else ""
        explanation = re.sub(r"\s+", " ", docs.get(field.name, ""))
        keys.append(f"  {name} {default}\n{fill(' ' * 6 + explanation + choices, 6)}".rstrip())
    return "\n".join(keys + sections)


def section_title(name: str, field: "dataclasses.Field[Any]", option: Any, tagged: bool) -> str:
    """The line of --help above a section: how to choose this class for it, whether it is the default, what it is."""
    notes = [f"{name}.name={names_of(option)[0]}"] if tagged else []
    default: Any = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    if type(default) is option:
        plain = [part for part in dataclasses.fields(option) if part.default_factory is dataclasses.MISSING]
        values = {part.name: (getattr(default, part.name), part.default) for part in plain}
        given = [f"{key}={to_text(value)}" for key, (value, usual) in values.items() if value != usual]
        if given or tagged:
            notes.append(f"default: {' '.join(given)}" if given else "the default")
    about = f" ({', '.join(notes)})" if notes else ""
    return f"{name}{about}: {(option.__doc__ or '').strip().splitlines()[0]}"


def to_text(value: Any) -> str:
    """A default value as a user would write it in an override."""
    return json.dumps(value, default=str).strip('"')
