"""Packages of the extra `paper`; the core needs torch, numpy and safetensors alone."""

from __future__ import annotations

from importlib.util import find_spec

__all__ = ["require"]


def require(package: str, purpose: str) -> None:
    """Check that a package of the extra `paper` is installed, without importing it.

    Args:
        package: the name that it is imported by.
        purpose: the beginning of the error message, such as ``pathnet.figures draws with matplotlib``.

    Raises:
        ModuleNotFoundError: the package is not installed; the message, one line, names the extra.
    """
    if find_spec(package) is None:
        message = f"{purpose}, which is not installed: pip install 'pathnet[paper]'"
        raise ModuleNotFoundError(message, name=package)
