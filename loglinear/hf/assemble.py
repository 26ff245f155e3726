"""Our modules as one file that imports nothing of ours, so that an exported model runs where loglinear is not.

The file is put together from the very sources that trained the model: there is no second implementation to keep in
step. Imports of ours are dropped, since what they name stands further up in the file. An `if` that imports a kernel or
another library that may be absent is dropped too, and a function that does so, with every `if` that calls it: what
follows such an `if` is the form in PyTorch.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ENTRY = "loglinear.hf.modeling"
LEFT_OUT = ("loglinear.config",)  # pydantic's; types alone, which annotations name and nobody evaluates
ALLOWED = {"torch", "transformers", "numpy"}  # transformers itself requires numpy


def assemble() -> str:
    """The source of `ENTRY` and of all modules of ours that it needs, in the order in which they import each other."""
    modules: dict[str, str] = {}
    _collect(ENTRY, modules)
    trees = {name: ast.parse(source) for name, source in modules.items()}
    _check_names(trees)
    bodies = [f"\n# {'-' * 10} {name}\n\n{_body(modules[name], tree)}" for name, tree in trees.items()]
    header = (
        '"""A log-linear attention language model for transformers, in one file. Written by `loglinear export`."""\n\n'
    )
    types = f"{' = '.join(_types(trees))} = Any  # configurations, in annotations alone"
    return "\n".join([header + "from __future__ import annotations\n", *_imports(trees), "", types, *bodies])


def _collect(name: str, modules: dict[str, str]) -> None:
    """Add the module `name` behind those that it imports."""
    if name in modules or name in LEFT_OUT:
        return
    source = _path(name).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and _is_ours(node.module):
            assert not any(alias.asname for alias in node.names), f"{name}: an import of ours is renamed"
            for home in {_home(node.module or "", alias.name) for alias in node.names}:
                _collect(home, modules)
    modules[name] = source


def _path(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _is_ours(module: str | None) -> bool:
    return (module or "").split(".")[0] == "loglinear"


def _home(module: str, name: str) -> str:
    """The module that defines `name`, which a package may only pass on."""
    path = _path(module)
    if path.name != "__init__.py":
        return module
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return _home(node.module or "", name)
    return f"{module}.{name}"


def _check_names(trees: dict[str, ast.Module]) -> None:
    """Two modules must not define the same name: one would hide the other."""
    owner: dict[str, str] = {}
    for module, tree in trees.items():
        for name in _definitions(tree):
            assert owner.setdefault(name, module) == module, f"{module} and {owner[name]} both define {name}"


def _definitions(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name))


def _imports(trees: dict[str, ast.Module]) -> list[str]:
    """Every import of other libraries, once."""
    plain, named = set(), {}
    for tree in trees.values():
        for node in tree.body:
            if isinstance(node, ast.Import):
                plain |= {ast.unparse(ast.Import([alias])) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not _is_ours(node.module) and node.module != "__future__":
                named.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
    return sorted(plain) + [
        f"from {module} import {', '.join(sorted(names))}" for module, names in sorted(named.items())
    ]


def _types(trees: dict[str, ast.Module]) -> list[str]:
    """The names that come from modules that are left out."""
    nodes = (node for tree in trees.values() for node in tree.body if isinstance(node, ast.ImportFrom))
    return sorted({alias.name for node in nodes if node.module in LEFT_OUT for alias in node.names})


def _body(source: str, tree: ast.Module) -> str:
    """A module without its imports and without branches that import what may be absent."""
    absent = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and _imports_others(node.body)}
    dropped = {
        line
        for node in ast.walk(tree)
        if _is_dropped(node, tree, absent)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)  # pyright: ignore[reportAttributeAccessIssue]
    }
    lines = source.splitlines()
    return "\n".join(line for number, line in enumerate(lines, 1) if number not in dropped).strip() + "\n"


def _is_dropped(node: ast.AST, tree: ast.Module, absent: set[str]) -> bool:
    """Whether it is an import, or imports what may be absent, or asks for a function in `absent` that does."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return node in tree.body
    if isinstance(node, ast.FunctionDef):
        return node.name in absent
    asked = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return isinstance(node, ast.If) and (_imports_others(ast.walk(node)) or bool(asked & absent))


def _imports_others(nodes: Iterable[ast.AST]) -> bool:
    """Whether one of them imports anything but the standard library and `ALLOWED`."""
    inner = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {node.module or "" if isinstance(node, ast.ImportFrom) else node.names[0].name for node in inner}
    return bool({name.split(".")[0] for name in names} - ALLOWED - sys.stdlib_module_names)
