"""A configuration as text: YAML, dotted overrides, and what is wrong with them in one sentence."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from loglinear.errors import UserError

# What pydantic calls a mistake, where its own words are those of a programmer.
WORDS = {
    "missing": "{name} is missing",
    "model_type": "{name} is a section: write `key: value` lines below it",
    "tuple_type": "{name} is a list: write [a, b] or a line `- a` for each",
    "invalid_key": "key {name} is no text",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """The sections of a YAML file; those that are empty are left out.

    Raises:
        UserError: the file is missing, no YAML, or no mapping, or a key stands twice.
    """
    try:
        tree = _UniqueKeyLoader(path.read_text(encoding="utf-8")).get_single_data()
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; the examples are in configs/") from None
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable YAML file ({' '.join(str(error).split())})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: the top level must be sections such as `model:` and `train:`")
    return {section: values for section, values in tree.items() if values is not None}


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Change `tree` by an override such as `optimizer.lr=1e-3`, whose value is YAML.

    Raises:
        UserError: it is not of that form, or leads through something that is no section.
    """
    dotted, equals, text = override.partition("=")
    if not equals or not all(dotted.split(".")):
        raise UserError(f"override {override!r}: write it as section.key=value, such as optimizer.lr=1e-3")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter from what looks like a date and is none
        raise UserError(f"override {override!r}: the value is not YAML; quote it") from None
    set_value(tree, dotted, value)


def set_value(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set what is called, say, `optimizer.lr` in `tree`.

    Raises:
        UserError: the name leads through something that is no section.
    """
    node = tree
    *sections, last = dotted.split(".")
    for key in sections:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            kind = "a list, to be given as a whole" if isinstance(child, list) else "a value"
            raise UserError(f"override {dotted!r}: {key!r} is {kind}, not a section")
        node = child
    node[last] = value


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first problem of a failed validation of `root` as one sentence."""
    problem = error.errors()[0]
    location, kind = problem["loc"], problem["type"]
    name = ".".join(str(part) for part in location)
    if kind == "extra_forbidden":
        return f"unknown key {name!r}; {_nearest(location, root)}"
    if kind in WORDS:
        return WORDS[kind].format(name=name)
    message = problem["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{name}: {message}" if name else message
    shown = repr(problem["input"])
    return f"{name} = {shown if len(shown) < 60 else type(problem['input']).__name__}: {message}"


def sections(section: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Every section of a configuration with its keys from the top; a list's items are a section, too."""
    yield path, section
    for name, field in section.model_fields.items():
        for annotation in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from sections(annotation, (*path, name))


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe subset, in which a key that stands twice is an error instead of silently the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def _nearest(location: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """A hint: the known key most like the unknown one at `location`."""
    place = tuple(part for part in location[:-1] if isinstance(part, str))
    siblings = next((section.model_fields for path, section in sections(root) if path == place), {})
    near = {name: ".".join(map(str, (*location[:-1], name))) for name in siblings}
    known = {name: ".".join((*path, name)) for path, section in sections(root) for name in section.model_fields}
    for names, likeness in ((near, 0.6), (known, 0.6), (near, 0.5)):  # lr and rl are alike by 0.5
        match = difflib.get_close_matches(str(location[-1]), names, 1, likeness)
        if match:
            return f"did you mean {names[match[0]]!r}?"
    return f"known there: {', '.join(siblings)}" if siblings else "leave it out"
