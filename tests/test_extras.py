"""A core that needs torch, numpy and safetensors alone, and one line wherever a package of an extra is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from helpers import ROOT

from pathnet import extras

EXTRA = ("PIL", "matplotlib", "pyarrow", "rich", "scipy", "sklearn", "typer")
"""Modules of the extra `paper`."""

HIDE = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in hidden else self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Hiding, sys.meta_path)
"""


def run_without(packages: tuple[str, ...], script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script in a process that cannot import some packages."""
    return subprocess.run(
        [sys.executable, "-c", f"hidden = {packages!r}{HIDE}{script}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


CORE = """
import torch, pathnet
from pathnet import *
from pathnet.lesion import Lesion
from pathnet.training import Recipe, train

class Residual(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x):
        return x + self.conv(x)

data = pathnet.data.synthetic(images=64, shape=(3, 8, 8))
net = pathnet.models.preact_resnet(8, 4)
callback = pathnet.EffectiveDepth(data.random_batch(8, 0, 0), "depth.csv", every=1)
train(net, data, Recipe(epochs=1, batch_size=32, warmup_steps=1), "checkpoint.safetensors", callback=callback)
images, labels = data.random_batch(8, 0, 0)
tape = pathnet.record(net, images, labels)
tape.path_gradient_norms(pathnet.paths.enumerate_all(net.n))
pathnet.signed.judge(tape.squared_norms_by_length(20), tape.compare_lengths().norm ** 2)
pathnet.routed(net, images, [[1, 1]] * 3)
pathnet.nn.fused_residual(net.blocks[0], net.stem(images))
pathnet.lesion.rank(net, data).agreement()
pathnet.lesion.errors(net, data, [Lesion((1,))]).interval
pathnet.models.save(net, "net.safetensors")
pathnet.models.load("net.safetensors")
layers = [torch.nn.Conv2d(3, 4, 3), Residual(), torch.nn.Flatten(), torch.nn.Linear(144, 10)]
print(pathnet.adapt(torch.nn.Sequential(*layers), images).n)
"""


def test_the_core_needs_no_package_of_the_extra(tmp_path: Path) -> None:
    done = run_without(EXTRA, CORE, tmp_path)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


LOAD = "from pathnet.paper import EXPERIMENTS; EXPERIMENTS['highway'].load()"


@pytest.mark.parametrize(
    ("package", "statement", "purpose"),
    [
        (
            "sklearn",
            "import pathnet; pathnet.data.digits()",
            "pathnet.data.digits takes the digits from scikit-learn",
        ),
        (
            "pyarrow",
            "import pathnet; pathnet.data.load('cifar')",
            "pathnet.data.cifar10 reads Parquet files with pyarrow",
        ),
        ("PIL", "import pathnet; pathnet.data.load('classes')", "pathnet.data decodes images with pillow"),
        ("pyarrow", "from pathnet import results", "pathnet.results stores measurements with pyarrow"),
        ("scipy", "from pathnet.experiments import run", "pathnet.experiments tests hypotheses with scipy"),
        ("scipy", "import pathnet; pathnet.experiments", "pathnet.experiments tests hypotheses with scipy"),
        ("matplotlib", "import pathnet; pathnet.figures", "pathnet.figures draws with matplotlib"),
        ("pyarrow", "import pathnet; pathnet.measure", "pathnet.results stores measurements with pyarrow"),
        ("scipy", "import pathnet; pathnet.measure", "pathnet.experiments tests hypotheses with scipy"),
        ("matplotlib", LOAD, "pathnet.figures draws with matplotlib"),
        ("rich", "from pathnet.figures import table_6", "pathnet.figures prints tables with rich"),
        ("pyarrow", LOAD, "pathnet.results stores measurements with pyarrow"),
    ],
)
def test_a_missing_package_is_one_line_that_names_it(
    tmp_path: Path, package: str, statement: str, purpose: str
) -> None:
    (tmp_path / "cifar").mkdir()
    for split in ("train", "test"):
        (tmp_path / "cifar" / f"{split}-00000.parquet").write_bytes(b"PAR1")
        (tmp_path / "classes" / split / "cat").mkdir(parents=True)
        (tmp_path / "classes" / split / "cat" / "0.png").write_bytes(b"\x89PNG")
    done = run_without((package,), statement, tmp_path)
    advice = f"pip install {extras.EXTRA[package]}, or the extra 'paper' of pathnet"
    message = f"ModuleNotFoundError: {purpose}, which is not installed: {advice}"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == message, done.stderr


def test_a_package_that_is_broken_keeps_its_own_error(tmp_path: Path) -> None:
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("import a_package_that_matplotlib_needs")
    done = run_without((), "sys.path.insert(0, ''); import pathnet; pathnet.figures", tmp_path)
    last = done.stderr.splitlines()[-1]
    assert last == "ModuleNotFoundError: No module named 'a_package_that_matplotlib_needs'"


COMMAND = "sys.argv = ['pathnet', '--help']; from pathnet.commands import main; main()"


@pytest.mark.parametrize("packages", [EXTRA, ("typer",), ("PIL",)], ids="-".join)
def test_a_command_without_the_extra_is_one_line_that_names_it(tmp_path: Path, packages: tuple[str, ...]) -> None:
    done = run_without(packages, COMMAND, tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    missing = [name for module, name in extras.EXTRA.items() if module in packages]
    advice = f"pip install {' '.join(missing)}, or the extra 'paper' of pathnet"
    assert done.stderr == f"pathnet: commands need {', '.join(missing)}, not installed here: {advice}\n"


def test_commands_need_what_the_extra_installs() -> None:
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["paper"]
    assert sorted(extras.EXTRA.values()) == sorted(name.partition(">")[0] for name in extra)
