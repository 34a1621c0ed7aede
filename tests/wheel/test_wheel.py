"""The packages in ``dist/``, as a user installs them: without a compiler, and without this repository.

``make wheel-test`` builds them and runs this file; the environment variable PATHNET_WHEEL names the wheel.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from helpers import ROOT, TESTS

import pathnet

WHEEL = Path(os.environ.get("PATHNET_WHEEL", "")).resolve()
TORCH = os.environ.get("PATHNET_WHEEL_TORCH", f"torch=={metadata.version('torch').partition('+')[0]}")
"""The requirement of the torch that the wheel runs with."""

pytestmark = pytest.mark.skipif(not WHEEL.is_file(), reason="make wheel-test builds a wheel and names it")

SMOKE = Path(__file__).with_name("smoke.py")
SCRIPT = TESTS / "types" / "user_script.py"
COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "nvcc", "cmake", "ninja")


def run(
    command: Sequence[str | Path], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


def pip_install(python: Path, *requirements: str) -> None:
    # With the settings of this process, such as those of pip.
    command = [python, "-m", "pip", "install", "--quiet", *requirements]
    installed = run(command, python.parent, os.environ)
    assert installed.returncode == 0, installed.stderr


class Installed:
    """A fresh environment, whose programs run with nothing but their own folder on PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "venv" / "bin"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        pip_install(self.bin / "python", TORCH, str(WHEEL))

    def run(self, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": str(self.bin), "HOME": str(self.folder)}
        return run([self.bin / program, *arguments], self.folder, environment)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Return an environment with the wheel, without its extras."""
    return Installed(tmp_path_factory.mktemp("core"))


@pytest.fixture(scope="module")
def paper(core: Installed) -> Installed:
    """Return the same environment with the extra; tests that do without it come first."""
    pip_install(core.bin / "python", f"pathnet[paper] @ {WHEEL.as_uri()}")
    return core


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        names = wheel.namelist()
    information = f"pathnet-{pathnet.__version__}.dist-info"
    assert {Path(name).parts[0] for name in names} == {"pathnet", information}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "pathnet").rglob("*.py")}
    libraries = {name for name in names if name.endswith(".so")}
    assert {name for name in names if name.startswith("pathnet/")} == sources | libraries | {"pathnet/py.typed"}
    assert {re.sub(r"\.cpython.*", "", name) for name in libraries} == {"pathnet/_ops.so", "pathnet/_build"}
    assert f"{information}/licenses/LICENSE" in names


def test_the_sdist_holds_what_a_build_needs() -> None:
    (file,) = WHEEL.parent.glob("pathnet-*.tar.gz")
    with tarfile.open(file) as sdist:
        names = {"/".join(Path(name).parts[1:]) for name in sdist.getnames()}
    native = {str(source.relative_to(ROOT)) for source in (ROOT / "csrc").rglob("*") if source.is_file()}
    assert native | {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "CITATION.cff"} <= names
    assert not [name for name in names if name.endswith(".so") or name.startswith(("assets", "tests", "build"))]


def test_libraries_hold_no_path_of_this_machine(tmp_path: Path) -> None:
    with zipfile.ZipFile(WHEEL) as wheel:
        libraries = [wheel.extract(name, tmp_path) for name in wheel.namelist() if name.endswith(".so")]
    for library in libraries:
        content = Path(library).read_bytes()
        for path in (str(ROOT), str(Path.home()), "site-packages", "build-via-sdist"):
            assert path.encode() not in content, f"{library} contains {path}"
        dynamic = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_the_wheel_runs_without_a_compiler_and_without_the_extra(core: Installed) -> None:
    listed = core.run("python", "-c", f"import shutil; print([name for name in {COMPILERS} if shutil.which(name)])")
    assert listed.stdout == "[]\n", listed.stderr
    smoke = core.run("python", SMOKE)
    assert smoke.returncode == 0, smoke.stderr
    assert f"in {core.folder}/venv/" in smoke.stdout
    print(smoke.stdout)


def test_a_command_without_the_extra_says_so_in_one_line(core: Installed) -> None:
    demo = core.run("pathnet", "demo")
    assert demo.returncode == 1 and demo.stdout == ""
    expected = (
        r"pathnet: commands need typer.*, not installed here: pip install typer .*, or the extra 'paper' of pathnet\n"
    )
    assert re.fullmatch(expected, demo.stderr), demo.stderr


def test_the_library_runs_in_the_torch_of_the_interop_environment(tmp_path: Path) -> None:
    other = ROOT / ".venv-interop" / "bin" / "python"
    if not other.exists():
        pytest.skip("make test-interop sets up another torch")
    with zipfile.ZipFile(WHEEL) as wheel:
        wheel.extractall(tmp_path / "packages")
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "packages")}
    smoke = run([other, SMOKE], tmp_path, environment)
    assert smoke.returncode == 0, smoke.stderr
    assert f"in {tmp_path}" in smoke.stdout
    print(smoke.stdout)


def test_the_demo_draws_its_figure(paper: Installed) -> None:
    demo = paper.run("pathnet", "demo", "--json")
    assert demo.returncode == 0, demo.stderr
    assert json.loads(demo.stdout)
    figures = sorted((paper.folder / "runs" / "demo" / "figures").glob("figure-6*.png"))
    assert figures and figures[0].read_bytes().startswith(b"\x89PNG")


def test_doctor_finds_the_engines(paper: Installed) -> None:
    doctor = paper.run("pathnet", "doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    facts = json.loads(doctor.stdout)
    assert (facts["native library"], facts["engine cpu"]) == ("built", "usable")


@pytest.fixture(scope="module")
def checkers(paper: Installed) -> Installed:
    pip_install(paper.bin / "python", "mypy", "pyright[nodejs]")
    return paper


def test_mypy_accepts_a_users_script(checkers: Installed) -> None:
    checked = checkers.run("mypy", "--strict", SCRIPT)
    assert checked.returncode == 0, checked.stdout


def test_pyright_accepts_a_users_script(checkers: Installed) -> None:
    command = [checkers.bin / "pyright", "--pythonpath", checkers.bin / "python", SCRIPT]
    # The package of pyright for pip gets its program from npm, with the settings of this process.
    checked = run(command, checkers.folder, {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"})
    assert checked.returncode == 0, checked.stdout


def test_a_users_script_runs(paper: Installed) -> None:
    ran = paper.run("python", SCRIPT)
    assert ran.returncode == 0, ran.stderr
