"""Code blocks of Markdown pages, run as a reader would who follows the page from top to bottom in one session.

- Python blocks of a page share their names, shell blocks their folder, in which Python blocks run as well.
- A ``text`` block directly below a block is what that block prints. A block that prints must have one; what a shell
  block writes to stderr does not count.
- ``<!-- file: NAME -->`` above a block saves it as a file in that folder in place of running it.
- ``<!-- not run: REASON -->`` above a block leaves it out; `REASONS` lists the reasons that count.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
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

REASONS = ("installs packages", "needs a GPU", "needs data", "needs another torch", "takes minutes")
"""Reasons for which a block is left out; `installs packages` blocks are the business of `make wheel-test`."""

FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)(?P=fence)[ ]*$", re.M | re.S
)
REMARK = re.compile(r"<!-- (?P<kind>file|not run): (?P<value>[^\n]*?) -->\s*\Z")
LANGUAGES = ("python", "sh")
SILENT = ("text", "mermaid", "bibtex", "toml", "yaml", "json", "cpp", "sql", "")
"""Languages of blocks that nothing runs: what they show is an output, or is tested elsewhere."""


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
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md") if (ROOT / name).exists()]
    return top + sorted((ROOT / "docs").rglob("*.md"))


def blocks_of(page: str) -> list[Block]:
    """Return the blocks of Python and shell code of a page, in order.

    Raises:
        ValueError: a block has a language or a reason that is not known, or an output belongs to no block.
    """
    blocks: list[Block] = []
    end = 0
    for match in FENCE.finditer(page):
        between, end = page[end : match.start()], match.end()
        language, line = match["info"].strip(), page[: match.start()].count("\n") + 1
        body = re.sub(f"^{match['indent']}", "", match["body"], flags=re.M)
        if language.startswith("{"):
            continue  # A directive of the site, which Sphinx checks.
        if language == "text" and blocks and not between.strip() and blocks[-1].output is None:
            blocks[-1].output = body
        elif language in LANGUAGES:
            remark = REMARK.search(between)
            if remark and remark["kind"] == "not run" and remark["value"] not in REASONS:
                raise ValueError(f"line {line}: expected a reason among {REASONS}, got {remark['value']!r}")
            blocks.append(Block(language, body, line, (remark["kind"], remark["value"]) if remark else None))
        elif language not in SILENT:
            raise ValueError(f"line {line}: expected a block of {LANGUAGES} or {SILENT}, got {language!r}")
    return blocks


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
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # The package of this checkout, also where another is installed; and the width of a reader's terminal.
    environment: dict[str, Any] = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    ran = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.code],
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
