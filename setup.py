"""Build the native libraries by calling CMake; everything else is in pyproject.toml."""

import os
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def torch_folder() -> Path:
    """Return the folder of torch, which is not imported: that needs the libraries of CUDA, and a build does not."""
    torch = find_spec("torch")
    if torch is None or torch.origin is None:
        raise ModuleNotFoundError("torch is not installed, whose headers and libraries pathnet is built with")
    return Path(torch.origin).parent


class CMakeBuild(build_ext):
    """Build both extensions by one CMake call, in a folder that is kept, so that a second call only relinks."""

    def run(self) -> None:
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise SystemExit("the headers of Python are missing, which a build needs: install them (python3-dev)")
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        torch = metadata.version("torch")
        folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch{torch}"
        configure = [
            *("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja"),
            f"-DPATHNET_TORCH_DIR={torch_folder()}",
            f"-DPATHNET_OUTPUT_DIR={package / 'pathnet'}",
            f"-DPATHNET_CUDA={os.environ.get('PATHNET_CUDA', 'ON')}",
            # Only where the sources stay: packages hold no paths of the machine that built them.
            f"-DPATHNET_LINE_INFO={'ON' if self.inplace else 'OFF'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        # Tools that pip installed next to this Python need not be on the caller's PATH.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # The kept folder remembers a ninja that may be gone, such as that of an isolated build or a removed venv.
        if ninja := shutil.which("ninja", path=path):
            configure.append(f"-DCMAKE_MAKE_PROGRAM={ninja}")
        for command in (configure, ["cmake", "--build", folder]):
            if subprocess.run(command, env={**os.environ, "PATH": path}).returncode:
                # Without a traceback, so that CMake's own message stands last.
                raise SystemExit("the native library was not built: see the error of CMake or the compiler above")

    def get_outputs(self) -> list[str]:
        suffixes = {"pathnet._ops": ".so"}
        package = Path(self.build_lib)
        default = sysconfig.get_config_var("EXT_SUFFIX")
        return [
            str(package.joinpath(*e.name.split(".")).with_suffix("")) + suffixes.get(e.name, default)
            for e in self.extensions
        ]


setup(
    ext_modules=[Extension("pathnet._ops", []), Extension("pathnet._build", [])], cmdclass={"build_ext": CMakeBuild}
)
