"""The comparison by which the outputs of pages and notebooks are judged."""

from __future__ import annotations

import pytest
from helpers.outputs import same_output
from helpers.pages import Block, blocks_of, problems


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("", ""),
        ("", "\n"),
        ("a b", "a  b\n"),
        ("tensor([1.2345e-05])", "tensor([1.2346e-05])"),
        ("0.226", "0.22649"),
        ("1 2.5", "1 2.5004"),
        ("0.50", "0.5"),
        ("1.5e-05", "1.6e-05"),
        ("0.30000000000000004", "0.3"),
        ("1.0", "0.99999994"),
        ("-0.0", "0.0"),
        ("version 2.13.0", "version 2.13.0"),
        ("epoch ... done", "epoch 1 2 3 done"),
        ("...", "anything"),
        ("first ...", "first"),
        ("a ... b ... c", "a x b b y c"),
    ],
)
def test_outputs_that_agree(expected: str, printed: str) -> None:
    assert same_output(expected, printed)


@pytest.mark.parametrize(
    ("expected", "printed"),
    [
        ("", "a"),
        ("a", ""),
        ("a b", "a"),
        ("100", "101"),
        ("0.226", "0.229"),
        ("1.234e-05", "1.234e-04"),
        ("1.5", "-1.5"),
        ("block 3", "block 4"),
        ("a ... c", "a b"),
        ("a ... b ... c", "a c"),
        ("... end", "end of it"),
        ("start ...", "no start"),
        ("float64", "float32"),
        ("tensor([1., 0., 1.])", "tensor([0., 1., 0.])"),
        ("0.", "1."),
        ("-1.", "0."),
        ("1000.", "1000.1"),
        ("5", "5.9"),
        ("5", "5.0"),
        ("5.0", "5"),
        ("0.5", "0.6"),
        ("0.50", "0.51"),
        ("1.0", "1.1"),
        ("1e-05", "2e-05"),
        ("1e-16", "0.0"),
        ("0.0", "1e-16"),
        ("0.000", "0.001"),
        ("1.5e-05", "1.7e-05"),
        ("#", "5"),
        ("5", "#"),
        ("a#", "a5"),
        ("version 2.13.0", "version 2.12.0"),
        ("3.5ms", "3.6ms"),
    ],
)
def test_outputs_that_differ(expected: str, printed: str) -> None:
    assert not same_output(expected, printed)


def test_a_pages_blocks_have_their_outputs_and_remarks() -> None:
    page = "\n".join(
        ["```python", "print(1)", "```", "", "```text", "1", "```", "words"]
        + ["<!-- file: a.py -->", "```python", "x = 1", "```", "<!-- not run: needs a GPU -->", "```sh", "gpu", "```"]
    )
    printing, saved, skipped = blocks_of(page)
    assert (printing.output, printing.remark, printing.line) == ("1\n", None, 1)
    assert saved.remark == ("file", "a.py") and skipped.remark == ("not run", "needs a GPU")


def test_a_block_that_prints_must_show_it() -> None:
    block = Block("python", "print(1)", 1, None)
    assert "(no output)" in (problems(block, "1\n") or "")
    assert problems(block, "") is None


PRINTS = "```python\nprint(1)\n```\n"


@pytest.mark.parametrize(
    ("page", "line", "error"),
    [
        ("```pyhton\n1\n```", 1, "expected a block of"),
        ("words\n```\nx = 1\n```", 2, "expected a block of"),
        ("```yaml\nx: 1\n```", 1, "expected a block of"),
        ("```json\n{}\n```", 1, "expected a block of"),
        ("```toml\nx = 1\n```", 1, "expected a block of"),
        ("```sql\nSELECT 1\n```", 1, "expected a block of"),
        ("```cpp\nint x;\n```", 1, "expected a block of"),
        ("<!-- not run: no time -->\n```sh\nls\n```", 2, "expected a reason among"),
        ("```{code-block} python\nx = 1\n```", 1, "expected a directive among"),
        ("```{code} python\nx = 1\n```", 1, "expected a directive among"),
        ("```{code-cell}\nx = 1\n```", 1, "expected a directive among"),
        ("````{tip}\nwords\n```python\nx = 1\n```\n````", 3, "expected no code"),
        (":::{note}\n```python\nx = 1\n```\n:::", 2, "expected no code"),
        ("::::{note}\n:::{code} python\nx = 1\n:::\n::::", 2, "expected no code"),
        ("~~~{note}\n>>> x\n~~~", 2, "expected no code"),
        ("```{eval-rst}\n.. code-block:: python\n\n   x = 1\n```", 2, "expected no code"),
        ("```{eval-rst}\nAs follows::\n\n   x = 1\n```", 2, "expected no code"),
        (":::python\nx = 1\n:::\n:::", 4, "expected a fence that ends"),
        ("words\n> ```python\n> x = 1\n> ```", 2, "expected a fence at the left margin"),
        ("- ```python\n  x = 1\n  ```", 1, "expected a fence at the left margin"),
        ("words\n\n    ```python\n    x = 1\n    ```", 3, "expected a fence at the left margin"),
        ("words\n\n    x = 1", 3, "expected code in a block"),
        ("words\n\n\tx = 1", 3, "expected code in a block"),
        ("<pre>x = 1</pre>", 1, "expected code in a block"),
        ("words\n```python\nx = 1", 2, "expected a fence that ends"),
        ("````python\nx = 1\n```", 1, "expected a fence that ends"),
        ("```python\nx = 1\n~~~", 1, "expected a fence that ends"),
        ("```text\n1\n```", 1, "expected an output directly below its block"),
        (PRINTS + "It prints\n```text\n1\n```", 5, "expected an output directly below its block"),
        (PRINTS + "```text\n1\n```\n```text\n1\n```", 7, "expected an output directly below its block"),
        ("<!-- not run: needs data -->\n" + PRINTS + "```text\n1\n```", 5, "expected an output of a block that runs"),
        ("<!-- file: a.py -->\n" + PRINTS + "```text\n1\n```", 5, "expected an output of a block that runs"),
    ],
)
def test_a_page_with_a_block_that_nothing_checks_is_refused(page: str, line: int, error: str) -> None:
    with pytest.raises(ValueError, match=f"^line {line}: {error}"):
        blocks_of(page)


@pytest.mark.parametrize("fence", ["```", "~~~", "````"])
@pytest.mark.parametrize("indent", ["", "  "])
def test_a_block_has_either_fence_and_may_stand_in_a_list(fence: str, indent: str) -> None:
    page = f"1. words\n   go on\n\n{indent}{fence}python\n{indent}if x:\n\n{indent}    y\n{indent}{fence}\n"
    (block,) = blocks_of(page)
    assert (block.code, block.line) == ("if x:\n\n    y\n", 4)


def test_directives_without_code_hold_no_blocks() -> None:
    assert blocks_of(":::{tip}\nUse `x`.\n:::\n\n```{toctree}\na\n```\n") == []
