"""Packages of the extra `paper`, without which the core works: torch, numpy and safetensors suffice for that."""

from __future__ import annotations

from importlib import import_module

__all__ = ["require"]


def require(package: str, purpose: str) -> None:
    """Check that a package of the extra `paper` can be imported.

    Args:
        package: the name that it is imported by.
        purpose: the beginning of the error message, such as ``pathnet.figures draws with matplotlib``.

    Raises:
        ModuleNotFoundError: the package is not installed; the message, one line, names the extra.
    """
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        message = f"{purpose}, which is not installed: pip install 'pathnet[paper]'"
        raise ModuleNotFoundError(message, name=package) from None
