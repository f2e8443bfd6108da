"""What keeps the house a house: arrows point one way, files stay readable, methods say where they come from."""

import ast
import inspect
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import tersely
from tersely.anatomy import FAMILIES
from tersely.methods import METHODS

PACKAGE = Path(tersely.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# A module may import what stands above it here, and what belongs to its own unit; never a neighbour, never below.
LAYERS = (
    {"errors", "memory", "option", "side_by_side"},
    {"settings", "destination"},
    {"hf", "recipe"},
    {"text", "journal"},
    {"windows"},
    {"kernels"},
    {"linalg"},
    {"kinds", "stats"},
    {"anatomy"},
    {"methods"},
    {"allocate"},
    {"checkpoint", "watching"},
    {"opening"},
    {"calibrate", "deltas"},
    {"gradients", "predictions", "generate"},
    {"train", "convert", "cache", "diagnose"},
    {"rewrite"},
    {"targets", "tables"},
    {"sensitivity"},
    {"gating"},
    {"job"},
    {"planning"},
    {"refine", "temper", "own_text"},
    {"sweeps"},
    {"evaluation", "report"},
    {"steps"},
    {"outlook"},
    {"prepare", "verify", "export", "origin"},
    {"pipeline"},
    {"bench", "catalogue", "estimate", "push", "record"},
    {"demo", "progress"},
    {"cli"},
    {"__init__", "__main__"},
)
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}

# The arrows that point the other way, each inside a function that runs when everything has long been imported.
DEFERRED = {
    ("hf", "kinds"),  # a folder is opened: its manifest becomes modules
    ("hf", "deltas"),  # and what a folder of differences leaves out comes from its base
    ("hf", "opening"),  # and what is missing is refused
}

MAY_IMPORT_TRANSFORMERS = {
    "anatomy", "cache", "checkpoint", "cli", "convert", "diagnose", "evaluation", "generate", "hf", "train",
}  # fmt: skip

# The package may grow beyond the first 15 000 lines: thirty-three systems of two hundred lines each stand on 12 000.
LONGEST_FILE, LONGEST_BASE, LONGEST_PACKAGE = 500, 200, 40_000

every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def unit_of(path: Path) -> str:
    """The module or package directly below `tersely` that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(node: ast.AST, *, types_too: bool, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """(module, whether inside a function) of every import below a node; `from a import b` gives a.b."""
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import():
                yield from ((alias.name, inside) for alias in child.names)
            case ast.ImportFrom():
                assert child.level == 0, "imports are absolute"
                yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")) if not types_too:
                continue
            case _:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from imports(child, types_too=types_too, inside=inside or function)


def arrows(path: Path) -> Iterator[tuple[str, bool]]:
    """(unit of ours, whether inside a function) for every import of ours, those for types included."""
    for module, inside in imports(tree_of(path), types_too=path.name != "__init__.py"):
        package, _, rest = module.partition(".")
        if package == "tersely":
            name = rest.partition(".")[0]
            yield (name if name in RANK or _exists(name) else "__init__"), inside


def _exists(name: str) -> bool:
    return (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name / "__init__.py").is_file()


# --- arrows -----------------------------------------------------------------------------------------------------------


def test_every_module_has_its_layer():
    assert {unit_of(path) for path in FILES} <= RANK.keys()
    assert sum(len(layer) for layer in LAYERS) == len(RANK)


@every_file
def test_imports_point_one_way(path):
    unit = unit_of(path)
    for other, inside in arrows(path):
        if inside and (unit, other) in DEFERRED:
            continue
        assert other == unit or RANK[other] < RANK[unit], f"{unit} must not import {other}"


def test_every_deferred_arrow_is_still_there():
    found = {(unit_of(path), other) for path in FILES for other, inside in arrows(path) if inside}
    assert found >= DEFERRED


@every_file
def test_only_a_few_files_know_transformers(path):
    known = {module.partition(".")[0] for module, _ in imports(tree_of(path), types_too=False)}
    assert "transformers" not in known or unit_of(path) in MAY_IMPORT_TRANSFORMERS


def test_the_hook_into_transformers_stands_on_the_standard_library():
    top = {
        module.partition(".")[0]
        for module, inside in imports(tree_of(PACKAGE / "hf.py"), types_too=False)
        if not inside
    }
    assert top <= sys.stdlib_module_names | {"tersely"}


@every_file
def test_families_are_named_in_the_anatomy_alone(path):
    """Whoever compares with the name of a family knows what only the anatomy should know."""
    if unit_of(path) == "anatomy":
        return
    constants = {node.value for node in ast.walk(tree_of(path)) if isinstance(node, ast.Constant)}
    assert constants.isdisjoint(FAMILIES)


# --- weight -----------------------------------------------------------------------------------------------------------


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("module", ["tersely", "tersely.hf", "tersely.recipe", "tersely.cli"])
def test_importing_costs_neither_torch_nor_transformers(module):
    heavy = run(
        "-c", f"import sys, {module}; sys.stdout.write(' '.join({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    assert heavy == ""


def test_help_answers_at_once():
    """The best of three: another process may hold the machine."""
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        assert "compress" in run("-m", "tersely", "--help")
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 1.5


@every_file
def test_a_file_can_be_read_in_one_sitting(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= (LONGEST_BASE if path.name == "base.py" else LONGEST_FILE)


def test_the_package_keeps_its_line_budget():
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in FILES) < LONGEST_PACKAGE


@every_file
def test_no_file_is_a_drawer_for_odds_and_ends(path):
    """A function without a home has not been understood yet."""
    names = {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}
    assert names.isdisjoint({"utils", "util", "common", "helpers", "helper", "misc", "tools"})


# --- words ------------------------------------------------------------------------------------------------------------


@every_file
def test_a_file_begins_by_saying_what_it_is(path):
    assert ast.get_docstring(tree_of(path)) or not path.read_text(encoding="utf-8").strip()


@every_file
def test_nothing_is_printed_swallowed_or_passed_on_unnamed(path):
    for node in ast.walk(tree_of(path)):
        assert not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except"
            assert not all(isinstance(line, ast.Pass) for line in node.body), (
                f"line {node.lineno}: an error is swallowed"
            )
    for function in public_functions(tree_of(path)):
        # hf.py overrides methods of transformers, which are called with more than they are promised
        assert function.args.kwarg is None or unit_of(path) == "hf", (
            f"{function.name} takes **{function.args.kwarg.arg}"
        )


def public_functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods that others may call: nothing private, nothing that lives inside a function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            if not child.name.startswith("_") or child.name.endswith("__"):
                yield child
        elif isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public_functions(child)


@every_method
def test_a_method_names_its_paper_and_its_source(method):
    assert method.summary.strip()
    assert re.search(r"\b(18|19|20)\d\d\b", method.paper), "authors, year, title"
    source = re.search(r"^Source: (.+)", inspect.getmodule(method).__doc__, flags=re.MULTILINE)
    assert source is not None
    # the same first author in both
    assert method.paper.split()[0] in source.group(1)


@every_method
def test_every_field_of_a_method_says_what_it_is(method):
    (definition,) = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(method))))
        if isinstance(node, ast.ClassDef) and node.name == method.__name__
    ]
    followed = zip(definition.body, [*definition.body[1:], None], strict=True)
    documented = {
        statement.target.id
        for statement, after in followed
        if isinstance(statement, ast.AnnAssign)
        and isinstance(after, ast.Expr)
        and isinstance(after.value, ast.Constant)
        and isinstance(after.value.value, str)
        and after.value.value.strip()
    }
    assert {field.name for field in fields(method)} <= documented


@every_method
def test_a_method_is_built_from_its_defaults_and_cannot_be_changed(method):
    built = method()
    assert built == method()
    assert method.__dataclass_params__.frozen
