"""Code blocks of Markdown pages, run as a reader would who follows the page from top to bottom in one session.

- Python blocks of a page share their names, shell blocks their folder, in which Python blocks run as well.
- A ``text`` block directly below a block is what that block prints. A block that prints must have one; what a shell
  block writes to stderr does not count.
- ``<!-- file: NAME -->`` above a block saves it as a file in that folder in place of running it.
- ``<!-- not run: REASON -->`` above a block leaves it out; `REASONS` lists the reasons that count.

Code that would be shown without being run is an error: in a directive, a quotation or a list, indented, or in another
language. So is an output that belongs to no block that runs.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import ROOT
from helpers.outputs import same_output

__all__ = ["REASONS", "Block", "blocks_of", "documents", "imports", "run_page"]

REASONS = ("installs packages", "needs a GPU", "needs data", "needs another torch", "needs wandb", "takes minutes")
"""Reasons for which a block is left out; `installs packages` blocks are the business of `make wheel-test`, and
`needs wandb` ones of `tests/interop/test_wandb.py`."""

FENCE = re.compile(r"(?P<indent> {0,3})(?P<fence>(?P<mark>[`~:])(?P=mark){2,})(?P<info>.*)")
MARKS = re.compile(r"`{3}|~{3}|:{3}")
INDENTED = re.compile(r"( {4}|\t)\s*\S")
REMARK = re.compile(r"<!-- (?P<kind>file|not run): (?P<value>[^\n]*?) -->\s*\Z")
LANGUAGES = ("python", "sh")
SILENT = ("mermaid", "bibtex")
"""Languages of blocks in which nothing runs: a drawing, which the site renders, and the paper's entry, which
`tests/docs/test_facts.py` compares with CITATION.cff."""
DIRECTIVES = (
    *("admonition", "alias", "caution", "commands", "danger", "eval-rst", "figure", "glossary", "image", "important"),
    *("include", "math", "note", "seealso", "tip", "toctree", "warning"),
)
"""Directives of the site, which Sphinx checks; what they hold must be no code."""
CODE = re.compile(r"`{3}|~{3}|:{3}|>>> |^\s*\.\. (?:code|code-block|sourcecode|doctest|testcode)::|::$", re.M)
"""Beginnings of code in a directive, in Markdown or reStructuredText."""


@dataclass
class Block:
    """A block of code with the line that it begins in, its remark if it has one, and the output below it."""

    language: str
    code: str
    line: int
    remark: tuple[str, str] | None
    output: str | None = None


def documents() -> list[Path]:
    """Return the Markdown files whose blocks run."""
    names = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
    top = [ROOT / name for name in names if (ROOT / name).exists()]
    return top + sorted((ROOT / "docs").rglob("*.md"))


@dataclass
class Fenced:
    """Text between two fences, with what precedes it on the page."""

    info: str
    body: str
    line: int
    before: str


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of Python and shell code of a page, in order.

    Raises:
        ValueError: the page shows code that nothing runs, a block has a language or a reason that is not known, or an
            output belongs to no block that runs.
    """
    blocks: list[Block] = []
    for fenced in _fenced(page):
        language, where = fenced.info, f"line {fenced.line}"
        directive = re.match(r"\{([\w-]+)\}", language)
        if directive:
            if directive[1] not in DIRECTIVES:
                raise ValueError(f"{where}: expected a directive among {DIRECTIVES}, got {directive[1]!r}")
            if code := CODE.search(fenced.body):
                at = fenced.line + 1 + fenced.body[: code.start()].count("\n")
                raise ValueError(f"line {at}: expected no code in the directive {directive[1]!r}")
        elif language == "text":
            if not blocks or fenced.before.strip() or blocks[-1].output is not None:
                raise ValueError(f"{where}: expected an output directly below its block of {LANGUAGES}")
            if blocks[-1].remark:
                raise ValueError(f"{where}: expected an output of a block that runs")
            blocks[-1].output = fenced.body
        elif language in LANGUAGES:
            remark = REMARK.search(fenced.before)
            if remark and remark["kind"] == "not run" and remark["value"] not in REASONS:
                raise ValueError(f"{where}: expected a reason among {REASONS}, got {remark['value']!r}")
            blocks.append(Block(language, fenced.body, fenced.line, (remark[1], remark[2]) if remark else None))
        elif language not in SILENT:
            raise ValueError(f"{where}: expected a block of {(*LANGUAGES, 'text', *SILENT)}, got {language!r}")
    return blocks


def _fenced(page: str) -> Iterator[Fenced]:
    """Yield the text between fences at the left margin; refuse other code.

    Raises:
        ValueError: there is code without fences or not at the margin, or a fence is not closed.
    """
    opening: re.Match[str] | None = None
    start, inside, before = 0, list[str](), list[str]()
    for number, line in enumerate(page.splitlines(), 1):
        if opening is not None:
            if re.fullmatch(rf" {{0,3}}{opening['mark']}{{{len(opening['fence'])},}}\s*", line):
                body = "".join(f"{text.removeprefix(opening['indent'])}\n" for text in inside)
                yield Fenced(opening["info"].strip(), body, start, "\n".join(before))
                opening, inside, before = None, [], []
            else:
                inside.append(line)
        elif (match := FENCE.fullmatch(line)) and "`" not in match["info"]:
            opening, start = match, number
        elif MARKS.search(line):
            raise ValueError(f"line {number}: expected a fence at the left margin, got {line.strip()!r}")
        elif INDENTED.match(line) and not (before and before[-1].strip()):
            raise ValueError(f"line {number}: expected code in a block, got {line.strip()!r}")
        elif "<pre" in line:
            raise ValueError(f"line {number}: expected code in a block of Markdown, got {line.strip()!r}")
        else:
            before.append(line)
    if opening is not None:
        raise ValueError(f"line {start}: expected a fence that ends the block")


def imports(blocks: list[Block]) -> set[str]:
    """Return the top-level names of the modules that a page's Python blocks import."""
    names: set[str] = set()
    for block in blocks:
        if block.language == "python" and not (block.remark and block.remark[0] == "not run"):
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names.add(node.module.partition(".")[0])
    return names


def run_page(file: Path, folder: Path) -> Iterator[tuple[Block, str]]:
    """Run a page's blocks in a folder, and yield each block that ran with what it printed."""
    module = types.ModuleType("__main__")
    for block in blocks_of(file.read_text()):
        kind, value = block.remark or ("", "")
        if kind == "not run":
            continue
        if kind == "file":
            (folder / value).write_text(block.code)
            continue
        printed = _run_python(block, file, module) if block.language == "python" else _run_shell(block, folder)
        yield block, printed


def _run_python(block: Block, file: Path, module: types.ModuleType) -> str:
    # Blank lines in front, so that tracebacks name the line of the page.
    code = compile("\n" * block.line + block.code, str(file), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, module.__dict__)
    return printed.getvalue()


def _run_shell(block: Block, folder: Path) -> str:
    # The command of this checkout, which need not be installed.
    pathnet = f'pathnet() {{ {shlex.quote(sys.executable)} -m pathnet "$@"; }}; export -f pathnet\n'
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # The package of this checkout, also where another is installed; and the width of a reader's terminal.
    environment: dict[str, Any] = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", pathnet + block.code],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, f"line {block.line}: exit status {ran.returncode}\n{ran.stdout}{ran.stderr}"
    return ran.stdout


def problems(block: Block, printed: str) -> str | None:
    """Return what is wrong with the output that a page shows below a block, or None."""
    if same_output(block.output or "", printed):
        return None
    return f"line {block.line} prints\n{printed}\nbut the page shows\n{block.output or '(no output)'}"
