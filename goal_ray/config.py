"""Typed configs: a frozen dataclass ← YAML file ← `section.key=value` overrides. Anything unknown is refused.

A config class is a plain frozen dataclass with a docstring whose lines `name: what it does` document its fields.
"""

import dataclasses
import json
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from goal_ray.errors import ConfigError

T = TypeVar("T")


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

    Raises ConfigError naming the key and what it may be, before any work is done.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        tree = read_yaml(path)
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"{override!r} is not of the form section.key=value")
        try:
            set_dotted(tree, key.split("."), yaml.safe_load(value))
        except yaml.YAMLError:
            set_dotted(tree, key.split("."), value)
    return build_config(cls, tree, source=str(path) if path else "overrides")


def build_config(cls: type[T], tree: dict[str, Any], source: str) -> T:
    """Builds `cls` from a tree of plain values. Raises ConfigError as `load_config` does."""
    try:
        return TypeAdapter(cls).validate_python(with_default_tags(cls, tree))
    except ValidationError as error:
        lines = [explain(cls, item) for item in error.errors()]
        listed = f" {lines[0]}" if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        raise ConfigError(f"{source}:{listed}") from None


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


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML mapping. Raises ConfigError for a missing file, bad YAML, or anything but a mapping."""
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "; settings come behind a config file" if "=" in str(path) else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping of sections, not a {type(tree).__name__}")
    return tree


def set_dotted(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets tree[a][b][c] = value for keys a, b, c, making the mappings on the way."""
    for key in keys[:-1]:
        child = tree.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key!r} is a value, not a section")
        tree = child
    tree[keys[-1]] = value


def explain(cls: type, item: Any) -> str:
    """One readable line for one of pydantic's errors."""
    location = [str(part) for part in item["loc"]]
    key = ".".join(location) or "config"
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = known_keys(cls, location[:-1])
        return f"{key}: unknown key" + (f"; allowed here: {', '.join(known)}" if known else "")
    if item["type"] in ("missing", "missing_argument"):
        return f"{key}: required, but not given"
    message = item["msg"].removeprefix("Value error, ")
    given = item.get("input")
    shown = "" if isinstance(given, dict) or dataclasses.is_dataclass(given) else f" (got {given!r})"
    return f"{key}: {message}{shown}"


def known_keys(cls: Any, location: Sequence[str]) -> list[str]:
    """The field names of the config class found by walking `location` down from `cls`."""
    for part in location:
        options = dataclass_options(cls)
        hints = {name: hint for option in options for name, hint in typing.get_type_hints(option).items()}
        named = [option for option in options if typing.get_type_hints(option).get("name") and part in names_of(option)]
        cls = named[0] if named else hints.get(part)
    return [field.name for option in dataclass_options(cls) for field in dataclasses.fields(option)]


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


def describe(cls: type, prefix: str = "") -> str:
    """Help text: the class's own keys, then its sections; a key with its default and its line of the docstring."""
    docs = dict(re.findall(r"^\s*(\w+): (.+(?:\n {8,}.+)*)$", cls.__doc__ or "", re.MULTILINE))
    hints = typing.get_type_hints(cls)
    keys, sections = [], []
    for field in dataclasses.fields(cls):
        name, options = f"{prefix}{field.name}", dataclass_options(hints[field.name])
        for option in options:
            title = section_title(name, field, option, tagged=len(options) > 1)
            sections.append(f"\n{title}\n{describe(option, f'{name}.')}")
        allowed = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is typing.Literal else ()
        if options or len(allowed) == 1:  # the one allowed value is the section's tag, which its title tells
            continue
        default = "(required)" if field.default is dataclasses.MISSING else f"= {to_text(field.default)}"
        if field.default_factory is not dataclasses.MISSING:
            default = f"= {to_text(field.default_factory())}"
        choices = f" [{' | '.join(map(str, allowed))}]" if allowed else ""
        indent, explanation = " " * 6, re.sub(r"\s+", " ", docs.get(field.name, ""))
        text = textwrap.fill(explanation + choices, 100, initial_indent=indent, subsequent_indent=indent)
        keys.append(f"  {name} {default}\n{text}".rstrip())
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
