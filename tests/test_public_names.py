"""Requirements on each public name of the package: documentation, types, and a place in the list."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.docstrings import entries, refuses, section, undescribed, without_shape
from helpers.public_names import NAMES, PUBLIC, public_functions, value_of

import pathnet


@pytest.mark.parametrize("module", PUBLIC)
def test_the_names_of_a_public_module_are_those_of_the_list(module: str) -> None:
    listed = dir(pathnet) if module == "pathnet" else import_module(module).__all__
    assert sorted(listed) == sorted(PUBLIC[module])


def test_dir_lists_the_public_names_alone() -> None:
    assert dir(pathnet) == sorted(PUBLIC["pathnet"])
    modules = {name for name in PUBLIC["pathnet"] if isinstance(getattr(pathnet, name), ModuleType)}
    assert {f"pathnet.{name}" for name in modules} == set(PUBLIC) - {"pathnet"}
    with pytest.raises(AttributeError, match="^module 'pathnet' has no attribute 'nothing'$"):
        pathnet.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_type_checkers_see_the_names_that_are_imported_when_used() -> None:
    tree = ast.parse(Path(pathnet.__file__).read_text())
    (checked,) = (
        node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {}
    for node in checked.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names:
            assert alias.asname == alias.name, "type checkers export a name of a typed package only if it is repeated"
            seen[alias.name] = getattr(import_module(node.module), alias.name)
    assert seen == {name: getattr(pathnet, name) for name in dir(pathnet)}


def described_where_assigned(name: str) -> bool:
    """Return whether a string follows the assignment of a constant."""
    for source in Path(pathnet.__file__).parent.rglob("*.py"):
        body = ast.parse(source.read_text()).body
        for node, following in zip(body, body[1:], strict=False):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
    return False


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_has_a_docstring(module: str, name: str) -> None:
    value = value_of(module, name)
    if isinstance(value, ModuleType):
        assert value.__doc__
    elif inspect.isclass(value) or inspect.isfunction(value):
        members = [member for name, member in public_functions(value).items() if not name.startswith("__")]
        assert value.__doc__ and not [member.__name__ for member in members if not inspect.getdoc(member)]
    else:
        assert described_where_assigned(name)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_public_name_is_typed(module: str, name: str) -> None:
    value = value_of(module, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return
    for method, function in public_functions(value).items():
        if function.__module__ != value.__module__ or method not in inspect.getsource(value):
            continue  # written by `dataclass` from typed fields, or by `Protocol`
        parameters = inspect.signature(function).parameters
        untyped = {p for p in parameters if p not in ("self", "cls")} - function.__annotations__.keys()
        assert not untyped and "return" in function.__annotations__, f"{method}: {untyped or 'what it returns'}"


CONSTRUCTED = {"AdaptedNet", "Tape"}
"""Classes whose objects `pathnet.adapt` and `pathnet.record` return: nobody else calls their constructors."""


def documented(module: str, name: str) -> dict[str, tuple[Callable[..., Any], str]]:
    """Return the functions of a public name that have a docstring of their own, with it.

    That of a constructor is its class's. A method without one does what the method that it overrides says.
    """
    value = value_of(module, name)
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return {}
    functions = dict(public_functions(value))
    if inspect.isclass(value) and "__post_init__" in vars(value):
        functions["__post_init__"] = value.__post_init__
    if name in CONSTRUCTED:
        functions.pop("__init__")
    by_name = {}
    for method, function in functions.items():
        if function.__module__ == value.__module__ and method in inspect.getsource(value):
            source = value if method in ("__init__", "__post_init__") else function
            if source.__doc__:
                by_name[method] = function, inspect.cleandoc(source.__doc__)
    return by_name


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_docstring_describes_every_argument_and_the_shapes_of_tensors(module: str, name: str) -> None:
    lacking = {method: undescribed(*pair) for method, pair in documented(module, name).items()}
    assert not {method: names for method, names in lacking.items() if names}
    assert not [method for method, pair in documented(module, name).items() if without_shape(*pair)]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_docstring_names_the_errors_of_a_function_that_refuses_arguments(module: str, name: str) -> None:
    functions = documented(module, name)
    assert not [
        method
        for method, (function, docstring) in functions.items()
        if refuses(function) and "ValueError" not in entries(docstring, "Raises")
    ]


def test_what_a_docstring_lacks_is_seen() -> None:
    def function(x: torch.Tensor, count: int) -> torch.Tensor:
        raise ValueError(f"{x} {count}")

    whole = "Return it.\n\nArgs:\n    x: the input,\n        [B].\n    count: how many.\n\nReturns:\n    [B]\n"
    assert entries(whole, "Args") == {"x": "the input, [B].", "count": "how many. "}
    assert section(whole, "Raises") == ""
    assert undescribed(function, whole) == [] and not without_shape(function, whole) and refuses(function)
    assert undescribed(function, whole.replace("[B].", "any.")) == ["shape of x"]
    assert undescribed(function, whole.replace("count:", "counts:")) == ["count"]
    assert without_shape(function, whole.replace("    [B]\n", "    The result.\n"))
    assert not refuses(public_functions)


def test_no_public_name_hides_a_module_of_its_own_name() -> None:
    packages = [pathnet, *(import_module(name) for name in PUBLIC if name != "pathnet")]
    for package in packages:
        for info in pkgutil.iter_modules(getattr(package, "__path__", ())):
            if info.name in package.__all__:
                assert isinstance(getattr(package, info.name), ModuleType), f"{package.__name__}.{info.name}"


def test_an_editable_install_is_a_folder_that_type_checkers_follow() -> None:
    files = metadata.distribution("pathnet").files or []
    paths = [file for file in files if file.suffix == ".pth"]
    if not paths:
        pytest.skip("pathnet is not installed as editable")
    folder = Path(str(paths[0].locate())).read_text().strip()
    assert (Path(folder) / "pathnet" / "py.typed").exists(), "an import hook, which type checkers do not run"
