"""Imports go one way, and `import pathnet` loads almost nothing."""

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
    "extras",
    "printable",
    "checks",
    "settings",
    "writers",
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
    "signed",
    "walks",
    "entering",
    "places",
    "pull_backs",
    "gradients",
    "tape",
    "recorder",
    "adapted",
    "adaptation",
    "effective_depth",
    "lesion",
    "training",
    "progress",
    "workers",
    "results",
    "experiments",
    "figures",
    "paper",
    "report",
    "study",
    "commands",
    "__main__",
]
FILES = sorted(file for file in ROOT.rglob("*.py") if file != ROOT / "__init__.py")


def part(module: str) -> str:
    return module.removeprefix("pathnet.").split(".")[0]


def imported(file: Path) -> set[str]:
    """Return the parts of pathnet that a file imports, at the top or inside functions."""
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
    place = file.relative_to(ROOT).with_suffix("").parts[0]
    assert place in ORDER, f"{place} has no place in the order"
    assert {name for name in imported(file) if ORDER.index(name) > ORDER.index(place)} == set()


def imported_by(script: str) -> set[str]:
    script += "; import sys; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT.parent).split())


SLOW = {"torch._dynamo", "scipy", "scipy.stats", "matplotlib", "sklearn", "pyarrow", "PIL", "rich", "typer"}
"""Modules that take long to import and that the core needs seldom or never."""


def test_importing_the_package_imports_nothing_that_takes_long_and_is_seldom_needed() -> None:
    modules = imported_by("import pathnet")
    assert not modules & (SLOW | {"torch", "numpy"})
    assert {name for name in modules if name.startswith("pathnet.")} == {"pathnet.interrupts"}


def test_loading_a_network_imports_nothing_slow_beside_torch(tmp_path: Path) -> None:
    file = tmp_path / "net.safetensors"
    pathnet.models.save(pathnet.models.preact_resnet(depth=8, width=4), file)
    modules = imported_by(f"import pathnet; pathnet.models.load({str(file)!r})")
    assert "torch" in modules and not modules & {*SLOW, "sympy"}


def test_the_core_imports_nothing_slow_beside_torch() -> None:
    core = set(pathnet.__all__)
    modules = imported_by(f"import pathnet; [getattr(pathnet, name) for name in {sorted(core)!r}]")
    assert "torch" in modules and not modules & SLOW
