"""The Python examples of the README run as they stand, if the packages that they import are installed."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from helpers.triton_kernels import import_kernels

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

EXTRAS = {"torchvision", "timm", "transformers"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: text.splitlines()[-1][:40])
def test_python_examples_run(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    imported = set(re.findall(r"^(?:import|from) (\w+)", example, re.MULTILINE))
    lacking = sorted(name for name in imported if importlib.util.find_spec(name) is None)
    if set(lacking) & EXTRAS:
        pytest.skip(f"{', '.join(lacking)} is not installed (make test-interop has it)")
    import_kernels()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    exec(compile(example, "README.md", "exec"), {})


def test_there_are_examples() -> None:
    assert EXAMPLES
