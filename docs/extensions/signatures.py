"""Signatures without what only the package needs, and settings of dataclasses as their annotations describe them."""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING, is_dataclass
from typing import Any, get_type_hints

from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

from pathnet.settings import Help, settings_of

__all__ = ["setup"]

INTERNAL = ("pathnet.Tape", "pathnet.AdaptedNet")
"""Classes that `record` and `adapt` alone construct, of objects that are not public."""

ALIAS = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
COLON = "\ue000"
"""Stand-in for a colon that napoleon must not read."""


def _holds_settings(value: object) -> bool:
    if not (isinstance(value, type) and is_dataclass(value)):
        return False
    try:
        return any(setting.mark(Help) for setting in settings_of(value))
    except NameError:  # Its types are imported for type checkers alone; settings are read at run time.
        return False


def _without_marks(kind: type[Any]) -> str:
    """Return the signature of a dataclass of settings, whose annotations are types alone."""
    hints = get_type_hints(kind)
    signature = inspect.signature(kind)
    parameters = [
        parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        for name, parameter in signature.parameters.items()
    ]
    typed = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return stringify_signature(typed, unqualified_typehints=True)


def _signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, str] | None:
    if what == "class" and (name in INTERNAL or (signature or "").startswith("(*args")):
        return "", ""
    if what == "class" and _holds_settings(value):
        return _without_marks(value), ""
    if not ALIAS.search(f"{signature} {returned}"):
        return None
    # Sphinx names an alias within a union by a class of its own.
    return ALIAS.sub(r"\1", signature or ""), ALIAS.sub(r"\1", returned or "")


def _before_napoleon(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "property", "data") and lines:
        # Napoleon reads the first line of an attribute as "type: description", which pathnet never writes.
        lines[0] = lines[0].replace(":", COLON)
    elif what == "class" and _holds_settings(value):
        lines += ["", "Attributes:"]
        for setting in settings_of(value):
            default = "" if setting.default is MISSING else f" Default: ``{setting.default!r}``."
            kind = stringify_annotation(setting.type, mode="smart")
            lines.append(f"    {setting.name} ({kind}): {setting.help}{default}")


def _after_napoleon(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    lines[:] = [line.replace(COLON, ":") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to autodoc, around napoleon (called by Sphinx)."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
