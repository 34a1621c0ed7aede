"""Results files, and the kernel sources that no GPU has run."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.facts import commit_here
from pathnet import native

pytestmark = pytest.mark.skipif(not native.LOADED, reason=native.WHY_NOT)


def test_the_commit_comes_from_git(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert commit_here(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "one")
    clean = commit_here(tmp_path)
    assert clean is not None and len(clean) == 10
    (tmp_path / "file").write_text("2")
    assert commit_here(tmp_path) == f"{clean}-changed"


def sources(root: Path) -> Path:
    for path in ("csrc/plan.h", "csrc/cuda/a.cu", "csrc/cuda/b.cuh", "pathnet/engines/triton/c.py"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return root


def write_results(folder: Path, root: Path, began: str, tests: str = "passed", rehearsal: bool = False) -> None:
    steps = {"cuda_tests": {"status": "passed"}, "triton_tests": {"status": tests}}
    content = {"began": began, "kernels": results.kernel_hashes(root), "rehearsal": rehearsal, "steps": steps}
    results.write(folder / f"{began}.json", content)


def test_kernels_changed_since_the_newest_results(tmp_path: Path) -> None:
    root, folder = sources(tmp_path / "repository"), tmp_path / "results"
    all_sources = ["csrc/cuda/a.cu", "csrc/cuda/b.cuh", "csrc/plan.h", "pathnet/engines/triton/c.py"]
    assert results.changed_kernels(folder, root) == all_sources
    write_results(folder, root, "2026-01-01")
    assert results.changed_kernels(folder, root) == []
    (root / "csrc/cuda/a.cu").write_text("changed")
    (root / "csrc/cuda/new.cu").write_text("new")
    (root / "csrc/plan.h").unlink()
    changed = ["csrc/cuda/a.cu", "csrc/cuda/new.cu", "csrc/plan.h"]
    assert results.changed_kernels(folder, root) == changed
    # A rehearsal and a run with failed tests verify nothing.
    write_results(folder, root, "2026-01-02", rehearsal=True)
    write_results(folder, root, "2026-01-03", tests="failed")
    assert results.changed_kernels(folder, root) == changed
    write_results(folder, root, "2026-01-04")
    assert results.changed_kernels(folder, root) == []


def test_results_that_are_none_are_told(tmp_path: Path) -> None:
    for content in ("", "[]", "{}", '{"began": 1'):
        (tmp_path / "file.json").write_text(content)
        with pytest.raises(ValueError, match="results: .*file.json"):
            results.changed_kernels(tmp_path)


def test_a_write_that_fails_leaves_the_old_results(tmp_path: Path) -> None:
    results.write(tmp_path / "file.json", {"a": 1})
    with pytest.raises(ValueError):
        results.write(tmp_path / "file.json", {"a": float("nan")})
    assert json.loads((tmp_path / "file.json").read_text()) == {"a": 1}


def test_names_of_results() -> None:
    name = results.file_name("NVIDIA H100 80GB HBM3", "2026-11-23", "16c0608abc")
    assert name == "nvidia-h100-80gb-hbm3-2026-11-23-16c0608abc.json"


def test_results_in_the_repository_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    for file in results.FOLDER.glob("*.json"):
        assert not results.read(file)["rehearsal"]
    with capsys.disabled():
        if changed := results.changed_kernels():
            print(f"\nunverified on a GPU: {', '.join(changed)}")
