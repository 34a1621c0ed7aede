"""The habits of the house that a program can see: openings of docstrings, names, parameters, length of files.

``python tests/test_style.py FOLDER...`` lists what is wrong below some folders.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".cpp", ".h", ".cu", ".cuh")

HANGING = re.compile(
    r"(Of|What|Whether|How|Where|Why|Which|Who|When|With|Without|By|That|As|In|For|The same|On|From|To|So|Among|Beside"
    r"|Behind|Before|After|Likewise|Also|And|Or|If|Only|Not)\b"
)
"""First words of a docstring that hangs on the name above it."""

EMPTY_NAMES = {"own", "given", "made", "found", "taken", "others", "ways", "told", "asked"}
"""Names that say nothing of what they name."""

MOST_PARAMETERS = 8
MOST_LINES = 350
REASON = re.compile(r"\bLong (because|since)\b")
"""How the head of a longer file gives its reason."""


def sources() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    files = [ROOT / name for name in listed.split("\n") if name.endswith(SOURCES)]
    return [file for file in files if file.exists()]


def names_bound(node: ast.AST) -> Iterator[str]:
    """The names that a node gives to variables, parameters, attributes, functions and classes."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
        yield node.id
    elif isinstance(node, ast.arg):
        yield node.arg
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
        yield node.attr


def is_kernel(function: ast.FunctionDef) -> bool:
    """Whether a function is Triton's: its launch is by keyword, and its parameters are the kernel's registers."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def parameters(function: ast.FunctionDef) -> int:
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return sum(argument.arg not in ("self", "cls") for argument in arguments)


def python_faults(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 1)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            opening = (ast.get_docstring(node) or "").partition("\n")[0]
            if HANGING.match(opening):
                yield f"{line}: a docstring opens with {opening[:50]!r}"
        if isinstance(node, ast.FunctionDef) and not is_kernel(node) and parameters(node) > MOST_PARAMETERS:
            yield f"{line}: {node.name} has {parameters(node)} parameters"
        for name in names_bound(node):
            if name.strip("_") in EMPTY_NAMES:
                yield f"{line}: the name {name}"


def faults(file: Path) -> list[str]:
    source = file.read_text()
    lines = source.splitlines()
    problems = list(python_faults(source)) if file.suffix == ".py" else []
    if len(lines) > MOST_LINES and not REASON.search("\n".join(lines[:15])):
        problems.append(f"1: {len(lines)} lines, without a reason at the head")
    return problems


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_keeps_the_habits_of_the_house(file: Path) -> None:
    assert faults(file) == []


if __name__ == "__main__":
    for file in sources():
        if any(file.is_relative_to(Path(folder).resolve()) for folder in sys.argv[1:]):
            for fault in faults(file):
                print(f"{file.relative_to(ROOT)}:{fault}")
