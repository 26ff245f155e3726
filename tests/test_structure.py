"""The order of this house: who imports whom, what is written down about it, what never happens in it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launch.cluster import load_cluster
from launch.sweep import configurations, load_sweep
from loglinear.config import load_config

ROOT = Path(__file__).parents[1]
PACKAGES = ("loglinear", "data_pipeline", "launch")
# Each may import those before it.
CONFIG = ["config_section", "config_text", "config_data", "config_model", "config"]
FLOW = ["errors", "checkpoint_folders", *CONFIG, "ops", "model", "parallel", "checkpoint", "train"]
FLOW += ["hf", "experiments", "launch", "bench", "scaling"]
FRONT_DOOR = {"loglinear.cli", "loglinear.__main__"}
VERSION = {"loglinear", "loglinear.__version__"}  # all that the package itself holds
LONGEST_FILE = 400
MARKERS = {"parametrize", "skipif", "skip", "xfail", "usefixtures", "filterwarnings"}  # pytest's own

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_files(*folders: str) -> list[Path]:
    """Every Python file below the folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def name_of(path: Path) -> str:
    """The dotted name of a module: loglinear/ops/__init__.py is loglinear.ops."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = {name_of(path): path for path in python_files(*PACKAGES)}
TREES = {name: parse(path) for name, path in SOURCES.items()}
EVERY_FILE = python_files(*PACKAGES, "tests") + sorted(ROOT.glob("*.py"))


def imports(tree: ast.AST) -> set[str]:
    """Every module that is imported anywhere in `tree`, inside functions too, and every name taken from one."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {node.args[0].value} if isinstance(node.args[0], ast.Constant) else set()
    return found


def is_within(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def part_of(name: str) -> str:
    """The part of the house that a module or a name belongs to."""
    package, *inner = name.split(".")
    return inner[0] if package == "loglinear" and inner else package


def may_import(importer: str, imported: str) -> bool:
    """Whether the architecture lets one module use another of ours."""
    if importer in FRONT_DOOR or imported in VERSION:
        return True
    source, target = part_of(importer), part_of(imported)
    if source == target:
        return True
    if source == "data_pipeline":
        return target in ("config", "errors")
    if target == "data_pipeline":
        return source in ("bench", *FLOW[FLOW.index("train") :])
    if source == "bench":
        return target in FLOW[: FLOW.index("train")]
    return source in FLOW and target in FLOW and FLOW.index(target) < FLOW.index(source)


def ours(tree: ast.AST) -> set[str]:
    return {name for name in imports(tree) if name.split(".")[0] in PACKAGES}


@pytest.mark.parametrize("name", TREES)
def test_imports_flow_one_way(name: str) -> None:
    assert not {imported for imported in ours(TREES[name]) if not may_import(name, imported)}


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("loglinear.train.run", "loglinear.model.build_model", True),
        ("loglinear.model.lm", "loglinear.train.run", False),
        ("loglinear.checkpoint.store", "loglinear.train.optim", False),
        ("loglinear.config", "loglinear.ops.num_levels", False),
        ("loglinear.ops.checks", "loglinear.errors.UserError", True),
        ("loglinear.errors", "loglinear.config.Config", False),
        ("loglinear.model.lm", "data_pipeline.batch.Batch", False),
        ("loglinear.train.run", "data_pipeline.loader.TrainLoader", True),
        ("data_pipeline.loader", "loglinear.config.DataConfig", True),
        ("data_pipeline.loader", "loglinear.ops.num_levels", False),
        ("loglinear.train.run", "launch.slurm", False),
        ("launch.slurm", "loglinear.train.run", True),
        ("loglinear.cli", "launch.slurm", True),
        ("loglinear.bench.ops", "loglinear.model", True),
        ("loglinear.bench.ops", "loglinear.train.plan", False),
        ("loglinear.bench.data", "data_pipeline.loader.TrainLoader", True),
        ("loglinear.scaling.recovery", "launch.submit", True),
        ("loglinear.train.run", "loglinear.scaling.parity", False),
        ("loglinear.train.run", "loglinear.__version__", True),
        ("loglinear", "loglinear.errors.UserError", False),
        ("loglinear.novelty", "loglinear.config.Config", False),
    ],
)
def test_the_rule_of_imports_by_hand(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


def test_ops_and_model_know_nothing_of_ranks() -> None:
    inner = {name: tree for name, tree in TREES.items() if part_of(name) in ("ops", "model")}
    assert len(inner) > 10
    for name, tree in inner.items():
        assert not {module for module in imports(tree) if is_within(module, "torch.distributed")}, name
        assert "torch.distributed" not in {ast.unparse(node) for node in ast.walk(tree)}, name


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def public(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, ast.ClassDef | Function]]:
    """Public classes and functions of a module, and public methods with their class."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield None, node
            if isinstance(node, ast.ClassDef):
                yield from ((node, method) for method in node.body if isinstance(method, Function))


CLASSES = {node.name: node for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef)}


def ancestors(owner: ast.ClassDef) -> Iterator[ast.ClassDef]:
    """The classes of ours that `owner` inherits from."""
    for base in owner.bases:
        parent = CLASSES.get(ast.unparse(base))
        if parent is not None:
            yield parent
            yield from ancestors(parent)


def documentation(owner: ast.ClassDef | None, node: ast.ClassDef | Function) -> str:
    """Its docstring, or that of the method of ours that it overrides, or its line in the class's."""
    overridden = [
        method
        for parent in (ancestors(owner) if owner else ())
        for method in parent.body
        if isinstance(method, Function) and method.name == node.name
    ]
    line = re.search(rf"^ *{node.name}: .*", ast.get_docstring(owner) or "", re.MULTILINE) if owner else None
    return next(filter(None, (ast.get_docstring(each) for each in (node, *overridden))), line[0] if line else "")


@pytest.mark.parametrize("name", TREES)
def test_everything_public_has_a_docstring(name: str) -> None:
    assert ast.get_docstring(TREES[name]), "the module itself"
    named = [(owner, node) for owner, node in public(TREES[name]) if not node.name.startswith("_")]
    assert not [(owner and owner.name, node.name) for owner, node in named if not documentation(owner, node)]


def arguments(function: Function) -> list[ast.arg]:
    given = function.args
    return [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]


@pytest.mark.parametrize("name", TREES)
def test_everything_public_is_annotated(name: str) -> None:
    for owner, node in public(TREES[name]):
        if not isinstance(node, Function):
            continue
        where = f"{owner.name if owner else name}.{node.name}"
        is_static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
        takes = arguments(node)[1 if owner and not is_static else 0 :]
        assert not [argument.arg for argument in takes if argument.annotation is None], where
        assert node.returns is not None, where


TENSOR = re.compile(r"(torch\.)?Tensor( \| None)?")
SHAPE = re.compile(r"\[[^\]]+\]|\([bt\w]+,[ \w+]*\)|scalar|one-dimensional|(as in|those of) `")  # or where to read them
SUFFIX = re.compile(r"_[a-z1]+$")  # of a tensor's name: one letter a dimension, told at the top of the file


@pytest.mark.parametrize("name", TREES)
def test_functions_of_tensors_tell_shapes(name: str) -> None:
    has_legend = "Shapes: " in (ast.get_docstring(TREES[name]) or "")
    for owner, node in public(TREES[name]):
        if not isinstance(node, Function) or node.name.startswith("_"):
            continue
        single = [given for given in arguments(node) if given is not node.args.vararg]
        tensors = [given.arg for given in single if TENSOR.fullmatch(ast.unparse(given.annotation or given))]
        if not (has_legend and all(map(SUFFIX.search, tensors))) and tensors:
            assert SHAPE.search(documentation(owner, node)), f"{owner.name if owner else name}.{node.name}"


UNSAFE = re.compile(r"(pickle|cPickle|dill|joblib|marshal|shelve)\..+|yaml\.((unsafe_|full_)?load(_all)?|\w*Loader)")


def unsafe_reads(tree: ast.AST) -> Iterator[str]:
    """Whatever could run code that lies in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and UNSAFE.fullmatch(ast.unparse(node)) and node.attr != "SafeLoader":
            yield ast.unparse(node)
        if isinstance(node, ast.Call):
            options = {option.arg: ast.unparse(option.value) for option in node.keywords}
            is_torch = ast.unparse(node.func) == "torch.load" and "weights_only" not in options
            if is_torch or options.get("weights_only") == "False" or options.get("allow_pickle", "False") != "False":
                yield ast.unparse(node)


@pytest.mark.parametrize("name", TREES)
def test_no_file_can_run_code(name: str) -> None:
    assert not list(unsafe_reads(TREES[name]))
    assert not imports(TREES[name]) & {"pickle", "pickle.load", "pickle.loads", "dill", "yaml.load", "torch.load"}


@pytest.mark.parametrize(
    "call",
    [
        "pickle.loads(x)",
        "yaml.load(x)",
        "torch.load(x)",
        "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=1)",
    ],
)
def test_code_in_files_would_be_noticed(call: str) -> None:
    assert list(unsafe_reads(ast.parse(call))) != []
    assert not list(unsafe_reads(ast.parse("torch.load(x, weights_only=True), yaml.safe_load(x), np.load(x)")))


def test_nothing_is_left_for_later() -> None:
    later = re.compile("TO" + "DO|FIX" + "ME|XX" + "X")
    texts = [*EVERY_FILE, *ROOT.glob("*.md"), *ROOT.glob("configs/**/*.yaml"), ROOT / "Makefile", ROOT / ".ci/run"]
    assert not [str(path) for path in texts if later.search(path.read_text(encoding="utf-8"))]


def test_the_command_line_answers_without_torch() -> None:
    heavy = "{'torch', 'deepspeed', 'datasets', 'numpy', 'sentencepiece'}"
    code = f"import sys, loglinear.cli; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "set()"


def test_every_marker_is_registered_and_asked_for_what_it_needs() -> None:
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    registered = {marker.partition(":")[0] for marker in options["markers"]}
    used = {
        match
        for path in python_files("tests")
        for match in re.findall(r"pytest\.mark\.(\w+)", path.read_text(encoding="utf-8"))
    }
    assert "--strict-markers" in options["addopts"]
    assert used - MARKERS <= registered
    assert registered == {"browser", "gpu", "slurm"}


def test_the_readme_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert {"make quickstart", "make test"} <= set(readme)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_is_explained(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if path.parent.name == "cluster":
        assert load_cluster(str(path)).kind == "slurm"
    elif path.parent.name == "sweep":
        assert load_sweep(path).name == path.stem
        assert configurations(load_sweep(path))
    else:
        assert load_config(path).run.name == path.stem
    assert path.read_text(encoding="utf-8").startswith("# ")


def test_the_commit_hooks_download_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in hooks["repos"]] == ["local"]


def test_the_ci_script_can_be_run_and_tests() -> None:
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert "lint test" in script.read_text(encoding="utf-8")
