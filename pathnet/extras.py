"""Packages of the extra `paper`; the core needs torch, numpy and safetensors alone."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["EXTRA", "advice", "require"]

EXTRA = {
    "typer": "typer",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "pyarrow": "pyarrow",
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "scipy": "scipy",
}
"""Packages of the extra ``paper``, by the modules that they install."""


def advice(*packages: str) -> str:
    """Return how to install packages of the extra, in words."""
    return f"pip install {' '.join(packages)}, or the extra 'paper' of pathnet"


def require(package: str, purpose: str) -> None:
    """Check that a package of the extra `paper` is installed, without importing it.

    Args:
        package: the name that it is imported by, a key of `EXTRA`.
        purpose: the beginning of the error message, such as ``pathnet.figures draws with matplotlib``.

    Raises:
        ModuleNotFoundError: the package is not installed; the message, one line, says how to install it.
    """
    if find_spec(package) is None:
        message = f"{purpose}, which is not installed: {advice(EXTRA[package])}"
        raise ModuleNotFoundError(message, name=package)
