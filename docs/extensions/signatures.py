"""Signatures without what only the package needs, and settings of dataclasses as their annotations describe them."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import is_dataclass
from typing import Any, get_type_hints

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.inspect import stringify_signature
from sphinx.util.typing import stringify_annotation

from pathnet.settings import Help, settings_of

__all__ = ["setup"]

INTERNAL = ("pathnet.Tape", "pathnet.AdaptedNet")
"""Classes that `record` and `adapt` alone construct, of objects that are not public."""

SETTING = re.compile(r"^ {4}(?P<name>\w+): ")
ALIAS = re.compile(r"TypeAliasForwardRef\('(\w+)'\)")
"""An alias within a union, as Sphinx names it."""
ARRAY = re.compile(r"(?:numpy\.)?ndarray\[tuple\[Any, \.\.\.\], (?:numpy\.)?dtype\[(?:numpy\.)?(\w+)\]\]")
"""An array of NumPy's, whose name `NDArray` Python forgets."""
FOREIGN = re.compile(r"(?<![\w.~])(?=(?:collections|numpy|pathlib|torch)\.)")
"""The beginning of a type of another package, of which the last word is enough."""
COLON = "\ue000"
"""Stand-in for a colon that napoleon must not read."""


def _holds_settings(value: object) -> bool:
    if not (isinstance(value, type) and is_dataclass(value)):
        return False
    try:
        return any(setting.mark(Help) for setting in settings_of(value))
    except NameError:  # Its types are imported for type checkers alone; settings are read at run time.
        return False


def _types(kind: type[Any]) -> dict[str, str]:
    """Return the types of a dataclass's fields, without marks, and by the names that the code gives them."""
    types = {}
    hints = get_type_hints(kind)
    for name, parameter in inspect.signature(kind).parameters.items():
        annotation = ast.parse(str(parameter.annotation), mode="eval").body
        if isinstance(annotation, ast.Subscript) and isinstance(annotation.slice, ast.Tuple):
            types[name] = ast.unparse(annotation.slice.elts[0])
        else:
            types[name] = stringify_annotation(hints[name], mode="smart")
    return types


def _without_marks(kind: type[Any]) -> str:
    """Return the signature of a dataclass of settings, whose annotations are types alone."""
    signature, types = inspect.signature(kind), _types(kind)
    parameters = [parameter.replace(annotation=types[name]) for name, parameter in signature.parameters.items()]
    typed = signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty)
    return stringify_signature(typed, unqualified_typehints=True)


def _signature(
    app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str | None, returned: str | None
) -> tuple[str, str] | None:
    if what == "class" and (name in INTERNAL or (signature or "").startswith("(*args")):
        return "", ""
    if what == "class" and _holds_settings(value):
        return _without_marks(value), ""
    shortened = [ARRAY.sub(r"NDArray[\1]", ALIAS.sub(r"\1", text or "")) for text in (signature, returned)]
    return None if shortened == [signature or "", returned or ""] else (shortened[0], shortened[1])


def _before_napoleon(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    if what in ("attribute", "property", "data") and lines:
        # Napoleon reads the first line of an attribute as "type: description", which pathnet never writes.
        lines[0] = lines[0].replace(":", COLON)
    elif what == "class" and _holds_settings(value):
        types = _types(value)
        lines[:] = [SETTING.sub(lambda match: _typed(match, types), line) for line in lines]


def _typed(match: re.Match[str], types: dict[str, str]) -> str:
    name = match["name"]
    return f"    {name} ({types[name]}): " if name in types else match[0]


def _after_napoleon(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    described: list[str] = []
    attribute = None
    for line in lines:
        if line.startswith(".. attribute::"):
            attribute = len(described)
        if attribute is not None and line.startswith("   :type:"):
            # As an option, the type stands beside the name, and not in a paragraph of its own.
            described.insert(attribute + 1, FOREIGN.sub("~", ARRAY.sub(r"NDArray[\1]", line)))
        else:
            described.append(line.replace(COLON, ":"))
    lines[:] = described


def _shorten_properties(app: Sphinx, document: nodes.document) -> None:
    # The type of a property passes no event of autodoc's.
    for annotation in document.findall(addnodes.desc_annotation):
        text = annotation.astext()
        if ARRAY.search(text):
            annotation.children = [nodes.Text(ARRAY.sub(r"NDArray[\1]", text))]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to autodoc, around napoleon (called by Sphinx)."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("autodoc-process-docstring", _before_napoleon, priority=400)
    app.connect("autodoc-process-docstring", _after_napoleon, priority=600)
    app.connect("doctree-read", _shorten_properties)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
