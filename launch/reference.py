"""Every setting of a run, a cluster and a sweep as a page: docs/config.md, from the classes and their docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import BaseModel

from launch.cluster import ClusterConfig
from launch.sweep import SweepConfig
from loglinear.config import Config
from loglinear.config_text import sections

HEAD = """\
# Configuration

Every setting of a run, of a cluster and of a sweep. `loglinear config reference` writes this page from the classes that
validate them. An unknown key, a value outside its bounds and a combination that cannot be are refused with a sentence
before anything is written.
"""
PARTS: dict[str, tuple[type[BaseModel], str]] = {
    "A run": (Config, "A YAML file such as those in [configs/](../configs); `section.key=value` changes a setting."),
    "A cluster": (
        ClusterConfig,
        "The file after `--cluster`, such as those in [configs/cluster/](../configs/cluster); `cluster.key=value`"
        " changes a setting.",
    ),
    "A sweep": (SweepConfig, "The file of `loglinear sweep`, such as those in [configs/sweep/](../configs/sweep)."),
}
TYPES = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text"}
BOUNDS = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
KEY = re.compile(r"^(?P<key>\w+): (?P<text>.*(?:\n {4}.*)*)", re.MULTILINE)  # of a docstring, with its further lines


def reference() -> str:
    """The page, as Markdown."""
    return HEAD + "".join(line for title, (root, about) in PARTS.items() for line in _part(title, root, about))


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """What the docstring of a section says of each key, in its order."""
    found = KEY.finditer(inspect.getdoc(section) or "")
    return {match["key"]: " ".join(match["text"].split()) for match in found}


def _part(title: str, root: type[BaseModel], about: str) -> Iterator[str]:
    yield f"\n## {title}\n\n{about}\n"
    for path, section in sections(root):
        if path:
            yield f"\n### {'.'.join(path)}\n\n{_summary(section)}\n"
        if root is not Config or path:  # a run is its sections
            yield "\n| key | type | default | meaning |\n|---|---|---|---|\n"
            yield from _rows(section)


def _summary(section: type[BaseModel]) -> str:
    """The docstring's first paragraph on one line."""
    return " ".join((inspect.getdoc(section) or "").partition("\n\n")[0].split())


def _rows(section: type[BaseModel]) -> Iterator[str]:
    told, defaults = descriptions(section), _defaults(section)
    for name, schema in section.model_json_schema()["properties"].items():
        if section.model_fields[name].is_required():
            default = "required"
        else:  # that of a section is its own keys', and None means that there is none
            default = f"`{_yaml(defaults[name])}`" if "$ref" not in schema and defaults[name] is not None else ""
        yield f"| `{name}` | {_type(schema)} | {default} | {told[name]} |\n"


def _defaults(section: type[BaseModel]) -> dict[str, Any]:
    """The default of every key that has one; of sections inside a list only what was written there."""
    whole = section.model_construct(set(section.model_fields))
    return whole.model_dump(mode="json", exclude_unset=True)


def _yaml(value: Any) -> str:
    """`value` as it may stand in a configuration."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def _type(schema: dict[str, Any]) -> str:
    """What a key takes, from pydantic's JSON schema of it."""
    if choices := [choice for choice in schema.get("anyOf", ()) if choice.get("type") != "null"]:
        return " or ".join(map(_type, choices))
    if "$ref" in schema:
        return "section"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema.get("type") == "array":
        pair = schema.get("prefixItems")
        return f"[{', '.join(map(_type, pair))}]" if pair else f"list of: {_type(schema['items'])}"
    if schema.get("type") == "object":
        values = schema["additionalProperties"]
        return f"by name: {_type(values if isinstance(values, dict) else {})}"
    bounds = [f"{sign} {schema[name]}".removesuffix(".0") for name, sign in BOUNDS.items() if name in schema]
    kind = "path" if schema.get("format") == "path" else TYPES.get(schema.get("type", ""), "anything")
    return f"{kind} {', '.join(bounds)}".strip()
