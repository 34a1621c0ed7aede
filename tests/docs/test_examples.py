"""Every public class and function has an example in its docstring, which runs and prints what it shows."""

from __future__ import annotations

import builtins
import doctest
import inspect
import io
import os
import random
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.outputs import same_output
from helpers.public_names import NAMES, PUBLIC, public_functions, value_of
from helpers.triton_kernels import import_kernels

import pathnet


def runs(value: object) -> bool:
    """Return whether a public name is a class or a function, and no module, constant or alias of types."""
    return inspect.isclass(value) or inspect.isfunction(value)


RUNNING = [(module, name) for module, name in NAMES if runs(value_of(module, name))]
SECTION = re.compile(r"^Examples?:$", re.M)
BY_METHOD = (pathnet.Tape, pathnet.Recorder)
"""Classes each of whose methods has an example; for others that of the class suffices."""


def docstrings() -> dict[str, str]:
    """Return the docstrings of public modules, classes, functions and methods, each once, by their full names."""
    by_name: dict[str, str] = {module: value_of(*split(module)).__doc__ or "" for module in PUBLIC if "." in module}
    seen: set[int] = set()
    for module, name in RUNNING:
        value = value_of(module, name)
        if id(value) in seen:
            continue
        seen.add(id(value))
        by_name[f"{module}.{name}"] = inspect.getdoc(value) or ""
        if inspect.isclass(value):
            for method, function in public_functions(value).items():
                by_name[f"{module}.{name}.{method}"] = inspect.getdoc(function) or ""
    return by_name


def session(name: str) -> list[str]:
    """Return the docstrings whose examples run in one session: a method's go on from those of its class."""
    class_docstring = DOCSTRINGS.get(name.rpartition(".")[0], "")
    return [class_docstring, DOCSTRINGS[name]] if name.rpartition(".")[0] not in PUBLIC else [DOCSTRINGS[name]]


def split(module: str) -> tuple[str, str]:
    package, _, name = module.rpartition(".")
    return package, name


DOCSTRINGS = docstrings()
WITH_EXAMPLES = [name for name, docstring in DOCSTRINGS.items() if ">>>" in docstring]


class Outputs(doctest.OutputChecker):
    """Comparison of outputs that allows for the rounding of processors."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return same_output(want.replace("<BLANKLINE>", ""), got)


def failures(docstrings: list[str]) -> str:
    """Run the examples of docstrings in one fresh session; return what does not print what it shows, else nothing."""
    names = types.ModuleType("__main__").__dict__
    report = io.StringIO()
    for docstring in docstrings:
        test = doctest.DocTest(doctest.DocTestParser().get_examples(docstring), names, "example", None, 0, docstring)
        # Not in a copy of the names, as the test would keep for itself.
        test.globs = names
        doctest.DocTestRunner(Outputs(), verbose=False).run(test, out=report.write, clear_globs=False)
    vars(builtins).pop("_", None)  # The last value that was shown.
    return report.getvalue()


def settings(variables: Sequence[str]) -> dict[str, object]:
    """Return global settings that no example may leave changed.

    Args:
        variables: the environment's variables that count; packages set further ones when they are imported.
    """
    return {
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "print": str(vars(torch._tensor_str.PRINT_OPTS)),
        "numpy": np.get_printoptions(),
        "environment": {name: os.environ.get(name) for name in variables},
        "folder": Path.cwd(),
    }


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in a temporary folder, as without the interpreter of Triton, and keep the random generators' states."""
    import_kernels()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.chdir(tmp_path)
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_the_examples_of_a_docstring_print_what_they_show(name: str, reader: None) -> None:
    variables = list(os.environ)
    before = settings(variables)
    assert not (report := failures(session(name))), report
    after = settings(variables)
    assert after == before, [setting for setting in before if after[setting] != before[setting]]


@pytest.mark.parametrize(("module", "name"), RUNNING)
def test_a_public_class_or_function_has_an_example(module: str, name: str) -> None:
    value = value_of(module, name)
    docstring = inspect.getdoc(value) or ""
    assert has_an_example(docstring), "expected a section `Example:` with `>>>` and an output"
    if value in BY_METHOD:
        methods = {
            method: function
            for method, function in public_functions(value).items()
            if method != "__init__" and not isinstance(vars(value)[method], property)
        }
        assert not [method for method, function in methods.items() if not has_an_example(inspect.getdoc(function))]


def has_an_example(docstring: str | None) -> bool:
    """Return whether a docstring has a section of examples, one of which shows an output."""
    _, *sections = SECTION.split(docstring or "")
    return any(example.want for section in sections for example in doctest.DocTestParser().get_examples(section))


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_stand_in_a_section_of_their_own(name: str) -> None:
    assert ">>>" not in SECTION.split(DOCSTRINGS[name])[0]


@pytest.mark.parametrize(
    ("example", "right"),
    [
        (">>> 1 + 1\n2", True),
        (">>> 1 + 1\n3", False),
        (">>> 0.1 + 0.2\n0.3", True),
        (">>> print('a\\n\\nb')\na\n<BLANKLINE>\nb", True),
        (">>> 1 + 1\n", False),
        (">>> x = 1\n1", False),
        (">>> int('x')\nTraceback (most recent call last):\nValueError: invalid literal ...", True),
        (">>> int('x')\nTraceback (most recent call last):\nTypeError: invalid literal ...", False),
        (">>> undefined", False),
    ],
)
def test_an_examples_output_is_compared(example: str, right: bool) -> None:
    assert (failures([example]) == "") == right


def test_an_example_goes_on_from_those_before() -> None:
    assert failures([">>> x = 1", ">>> x\n1"]) == ""
    assert "NameError" in failures([">>> x\n1"])


@pytest.mark.parametrize(
    "change",
    [
        "import os; os.environ['HOME'] = 'elsewhere'",
        "import os; os.chdir('/')",
        "import torch; torch.set_num_threads(torch.get_num_threads() + 1)",
        "import torch; torch.set_printoptions(precision=7)",
        "import torch; _ = torch.set_grad_enabled(False)",
        "import torch; torch.set_default_dtype(torch.float64)",
    ],
)
def test_a_setting_that_an_example_changes_is_seen(
    change: str, reader: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", os.environ.get("HOME", ""))
    before, threads = settings(["HOME"]), torch.get_num_threads()
    try:
        assert failures([f">>> {change}"]) == "" and settings(["HOME"]) != before
    finally:
        torch.set_num_threads(threads)
        torch.set_printoptions(profile="default")
        torch.set_grad_enabled(True)
        torch.set_default_dtype(torch.float32)


def test_an_example_needs_an_output_within_its_section() -> None:
    assert has_an_example("Words.\n\nExample:\n    >>> 1 + 1\n    2")
    assert not has_an_example("Words.\n\nExample:\n    >>> x = 1")
    assert not has_an_example("Words.\n\n>>> 1 + 1\n2")
    assert not has_an_example(None)
