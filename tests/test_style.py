"""Conventions that a program can check: openings of docstrings, names, numbers of parameters, lengths of files.

``python tests/test_style.py FOLDER...`` lists the problems below some folders.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "csrc", "docs", "pathnet", "tests")
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")

HANGING = re.compile(
    r"(Of|What|Whether|How|Where|Why|Which|Who|When|With|Without|By|That|As|In|For|The same|On|From|To|So|Among"
    r"|Beside|Behind|Before|After|Likewise|Also|And|Or|If|Only|Not)\b"
)
"""First words of a docstring that cannot be read without the name above it."""

EMPTY_NAMES = {"own", "given", "made", "found", "taken", "others", "ways", "told", "asked"}
"""Names that do not say what they hold."""

MAX_PARAMETERS = 8
MAX_LINES = 350
REASON = re.compile(r"\bLong (because|since)\b")
"""Words with which the head of a longer file gives its reason."""


def sources() -> list[Path]:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*") if file.suffix in SOURCES]
    return [ROOT / "setup.py", *sorted(files)]


def names_bound(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node binds: of variables, parameters, attributes, functions and classes."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr


def is_kernel(function: ast.FunctionDef) -> bool:
    """Return whether Triton compiles a function: kernels take their many parameters by keyword."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters(function: ast.FunctionDef) -> int:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in arguments)


def problems_of_python(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 1)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            opening = (ast.get_docstring(node) or "").partition("\n")[0]
            if HANGING.match(opening):
                yield f"{line}: a docstring opens with {opening[:50]!r}"
        if isinstance(node, ast.FunctionDef) and not is_kernel(node) and parameters(node) > MAX_PARAMETERS:
            yield f"{line}: {node.name} has {parameters(node)} parameters"
        for name in names_bound(node):
            if name.strip("_") in EMPTY_NAMES:
                yield f"{line}: the name {name}"


def problems_of(file: Path) -> list[str]:
    source = file.read_text()
    lines = source.splitlines()
    problems = list(problems_of_python(source)) if file.suffix == ".py" else []
    if len(lines) > MAX_LINES and not REASON.search("\n".join(lines[:15])):
        problems.append(f"1: {len(lines)} lines, without a reason at the head")
    return problems


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_follows_the_conventions(file: Path) -> None:
    assert problems_of(file) == []


if __name__ == "__main__":
    for file in sources():
        if any(file.is_relative_to(Path(folder).resolve()) for folder in sys.argv[1:]):
            for problem in problems_of(file):
                print(f"{file.relative_to(ROOT)}:{problem}")
