"""Sections of Google-style docstrings, and whether they say what callers need: arguments, shapes, errors."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

__all__ = ["entries", "refuses", "section", "undescribed", "without_shape"]

ENTRY = re.compile(r"    (?P<name>\w+): ?(?P<words>.*)")
SHAPE = re.compile(r"\[.*?\]", re.S)
REFERRED = re.compile(r"\[.*?\]|\b(see|as for) ", re.S)
TENSORS = re.compile(r"\b(Tensor|Array|NDArray)\b")


def section(docstring: str, title: str) -> str:
    """Return the indented text below a title such as ``Args``; empty if there is no such section."""
    match = re.search(rf"^{title}:\n((?:(?: {{4}}.*)?\n?)*)", docstring, re.M)
    return match[1] if match else ""


def entries(docstring: str, title: str) -> dict[str, str]:
    """Return the description of each name that a section lists."""
    by_name: dict[str, str] = {}
    name = ""
    for line in section(docstring, title).splitlines():
        if match := ENTRY.fullmatch(line):
            name = match["name"]
            by_name[name] = match["words"]
        elif name:
            by_name[name] += f" {line.strip()}"
    return by_name


def undescribed(function: Callable[..., Any], docstring: str) -> list[str]:
    """Return the parameters that the docstring does not describe, and the tensors among them without a shape.

    A shape may also stand elsewhere, to which the description refers.
    """
    parameters = inspect.signature(function).parameters
    described = entries(docstring, "Args")
    lacking = [name for name in parameters if name not in ("self", "cls") and not described.get(name)]
    tensors = [name for name in described.keys() & parameters if TENSORS.search(str(parameters[name].annotation))]
    return lacking + [f"shape of {name}" for name in tensors if not REFERRED.search(described[name])]


def without_shape(function: Callable[..., Any], docstring: str) -> bool:
    """Return whether a function returns a tensor, and its docstring no shape in brackets."""
    if not TENSORS.search(str(inspect.signature(function).return_annotation)):
        return False
    # Before the arguments too, where a short docstring has all in its first sentence.
    results = section(docstring, "Returns") or section(docstring, "Yields")
    return not SHAPE.search(results or docstring.partition("\n\nArgs:")[0])


def refuses(function: Callable[..., Any]) -> bool:
    """Return whether a function raises ValueError itself or by a check of an argument."""
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Raise) and node.exc is not None and "ValueError" in ast.unparse(node.exc):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2].lstrip("_")
            if name.startswith("check") or name == "one_of":
                return True
    return False
