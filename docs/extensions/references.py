"""References of docstrings: `Tape` and `Block.join` lead to the one public object of that name.

Names of the package that are not public have no page. They are shown as code if they exist, so that a reference to
something that was renamed is still a warning.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import cast

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.errors import NoUri
from sphinx.util.nodes import make_refnode

__all__ = ["setup"]

DESCRIBED = re.compile(r"docstring of ([\w.]+)")
"""The name in the source that autodoc gives a docstring."""


def _public(domain: PythonDomain, target: str) -> tuple[str, str] | None:
    """Return the page and the anchor of the public object whose name ends with a target, if there is just one."""
    places = {
        (entry.docname, entry.node_id)
        for name, entry in domain.objects.items()
        if name == target or name.endswith(f".{target}")
    }
    return places.pop() if len(places) == 1 else None


def _exists(target: str, source: str) -> bool:
    """Return whether a dotted name is something of the package, or of the module whose docstring names it."""
    described = DESCRIBED.search(source)
    scopes = described[1].split(".") if described else []
    return any(_value_exists(".".join([*scopes[:end], target])) for end in range(len(scopes) + 1))


def _value_exists(name: str) -> bool:
    parts = name.split(".")
    if parts[0] != "pathnet":
        return False
    for split in range(len(parts), 0, -1):
        try:
            value: object = import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for name in parts[split:]:
            if not hasattr(value, name):
                return False
            value = getattr(value, name)
        return True
    return False


def _resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, contents: nodes.Element
) -> nodes.reference | nodes.Element | None:
    if node.get("refdomain") != "py":
        return None
    domain = cast(PythonDomain, env.get_domain("py"))
    target = node["reftarget"]
    place = _public(domain, target)
    if place is not None:
        try:
            return make_refnode(app.builder, node["refdoc"], *place, contents, target)
        except NoUri:
            return None
    return contents if _exists(target, node.source or "") else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Resolve the references that Sphinx does not find (called by Sphinx)."""
    app.connect("missing-reference", _resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
