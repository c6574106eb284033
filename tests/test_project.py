"""What holds for all of the package's source."""

from __future__ import annotations

import ast
import contextlib
import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

import dsv4tools
from dsv4tools.checkpoint import open_checkpoint
from dsv4tools.template import derive_template
from dsv4tools.template.tables import load_tables

PACKAGE = Path(dsv4tools.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))


def parsed(path):
    return ast.parse(path.read_text("utf-8"), path)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_no_assert_stands_in_the_package(path):
    """``python -O`` takes asserts away: what is checked must be checked always."""
    assert [node.lineno for node in ast.walk(parsed(path)) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_only_the_command_line_prints_and_exits(path):
    if path.relative_to(PACKAGE).parts[0] in ("cli", "__main__.py"):
        return
    calls = [node.func for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
    found = {f.id for f in calls if isinstance(f, ast.Name)} & {"print", "exit", "quit", "input", "breakpoint"}
    found |= {f.attr for f in calls if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)
              and (f.value.id, f.attr) in {("sys", "exit"), ("os", "_exit"), ("os", "abort")}}
    assert not found


LOWER = {
    "gguf": ("checkpoint", "template", "policy", "plan", "convert", "verify", "cli", "model", "reroute", "synthetic"),
    "formats": ("gguf", "checkpoint", "template", "policy", "plan", "convert", "verify", "cli", "model", "reroute"),
    "checkpoint": ("gguf", "template", "policy", "plan", "convert", "verify", "cli", "model", "reroute"),
    "template": ("policy", "plan", "convert", "verify", "cli", "model", "reroute"),
    "imatrix": ("policy", "plan", "convert", "verify", "cli", "model", "reroute"),
    "model": ("cli",),
}


@pytest.mark.parametrize("room", LOWER)
def test_imports_point_one_way(room):
    for path in sorted((PACKAGE / room).rglob("*.py")):
        modules = {node.module for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom) and node.module}
        modules |= {a.name for node in ast.walk(parsed(path)) if isinstance(node, ast.Import) for a in node.names}
        wrong = {m for m in modules if m.startswith("dsv4tools.") and m.split(".")[1] in LOWER[room]}
        assert not wrong, path


def test_every_public_name_is_there():
    for name in dsv4tools.__all__:
        assert hasattr(dsv4tools, name)
        assert name in dir(dsv4tools)
    assert len(set(dsv4tools.__all__)) == len(dsv4tools.__all__)
    assert not hasattr(dsv4tools, "quantise")


def test_a_public_function_is_not_its_module():
    """Several share a name: dsv4tools.convert is in dsv4tools/convert.py, and importing that must not change it."""
    for name in dsv4tools.__all__:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(f"dsv4tools.{name}")
        assert not isinstance(getattr(dsv4tools, name), ModuleType), name


def test_every_row_of_the_template_tables_is_of_use(tiny_6e):
    """The shared checkpoint has every kind of layer: each tensor row and each required key stands in its template."""
    derived = derive_template(open_checkpoint(tiny_6e))
    tables = load_tables()
    names = {t.name for t in derived.tensors}
    for row in tables.tensors:
        assert any(row.name.format(layer=layer) in names for layer in range(5)), row.name
    keys = {kv.key for kv in derived.kvs}
    assert {f"deepseek4.{row.key}" for row in tables.metadata if not row.optional} <= keys
    assert all(count for count in derived.left_out.values())


# ------------------------------------------------------------------------------------------------------- documentation


ROOT = Path(__file__).parents[1]
PROMISES = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def named_tests(name: str) -> set[str]:
    """The tests that stand in a module of this suite."""
    return {node.name for node in parsed(ROOT / "tests" / name).body if isinstance(node, ast.FunctionDef)}


def test_behind_each_promise_stands_a_test():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]*) \|$", PROMISES, re.MULTILINE)
    promises = {promise: tests for promise, tests in rows if promise not in {"promise", "---"}}
    assert len(promises) > 30
    for promise, tests in promises.items():
        assert re.fullmatch(r"`test_\w+\.py::test_\w+`(, `test_\w+\.py::test_\w+`)*", tests), promise


def test_every_test_that_the_documentation_names_is_there():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", PROMISES)
    missing = [f"{module}::{name}" for module, name in named if name not in named_tests(module)]
    assert not missing
    everywhere = {name for path in (ROOT / "tests").glob("test_*.py") for name in named_tests(path.name)}
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md", ROOT / "SECURITY.md"]:
        names = set(re.findall(r"\btest_\w+\b(?!\.py)", path.read_text("utf-8")))
        assert names <= everywhere, path


def test_all_46_cases_stand_in_the_documentation():
    table = PROMISES.partition("## The 46 cases")[2]
    numbers = set()
    for cell in re.findall(r"^\| ([0-9, -]+) \|", table, re.MULTILINE):
        for span in cell.split(", "):
            first, _, last = span.partition("-")
            numbers |= set(range(int(first), int(last or first) + 1))
    assert numbers == set(range(1, 47))


LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("path", [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "SECURITY.md"],
                         ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path):
    missing = [link for link in LINK.findall(path.read_text("utf-8")) if not (path.parent / link).exists()]
    assert not missing
