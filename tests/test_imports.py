"""Data walks one way: a file imports only from what stands before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pathnet

ROOT = Path(pathnet.__file__).parent
ORDER = [
    "interrupts",
    "printable",
    "checks",
    "files",
    "full_precision",
    "native",
    "streams",
    "intervals",
    "models",
    "data",
    "paths",
    "scaling",
    "recording",
    "chunks",
    "engines",
    "nn",
    "routing",
    "walks",
    "gradients",
    "tape",
    "recorder",
    "adaptation",
    "effective_depth",
    "lesion",
    "training",
    "progress",
    "results",
    "experiments",
    "figures",
    "report",
    "study",
    "places",
    "flags",
    "cli",
    "__main__",
]
FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")


def part(module: str) -> str:
    return module.removeprefix("pathnet.").split(".")[0]


def imported(file: Path) -> set[str]:
    """The parts of pathnet that a file imports, at the top or inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pathnet":
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pathnet."):
            modules.add(part(node.module))
        elif isinstance(node, ast.Import):
            modules |= {part(alias.name) for alias in node.names if alias.name.startswith("pathnet.")}
    return modules & set(ORDER)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_go_one_way(file: Path) -> None:
    own = file.relative_to(ROOT).with_suffix("").parts[0]
    assert own in ORDER, f"{own} has no place in the order"
    assert {name for name in imported(file) if ORDER.index(name) > ORDER.index(own)} == set()


def test_importing_the_package_imports_nothing_that_takes_long_and_is_seldom_needed() -> None:
    script = "import sys, pathnet; print(*sorted({'torch._dynamo', 'scipy.stats', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
