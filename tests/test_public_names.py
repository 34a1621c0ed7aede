"""Requirements on each public name of the package: documentation, types, and a place in the list."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import pytest
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
