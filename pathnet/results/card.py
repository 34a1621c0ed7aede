"""The card of an exported run: what was measured, on what, by what, and what each column means."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from pathnet.printable import printable
from pathnet.results.run import Run

__all__ = ["card", "subset_of"]

SUBSETS = {"part": "path_gradients", "exact": "exact_sums", "signed": "signed_draws"}
"""Names of the kinds of row whose parts have shorter ones."""
ABOUT = {
    "part": "the norm of the gradient along one sampled path, on one batch",
    "exact": "the exact sum of the gradients of all paths of one length, on one batch",
    "signed": "an estimate, by random signs, of the sum of squared norms over all paths of one length, on one batch",
    "errors": "which test images one network misclassifies with one lesion, and how many",
    "values": "one number, named by `quantity`, measured on one network",
}
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M", 10_000_000: "1M<n<10M"}
LARGEST = "10M<n<100M"
PAPER = (
    "Veit, Wilber and Belongie, *Residual Networks Behave Like Ensembles of Relatively Shallow Networks*, NIPS 2016"
)


def subset_of(stem: str) -> str:
    """Return the name of the subset that holds one kind of row, which is also that of its file."""
    return SUBSETS.get(stem, stem)


def card(run: Run, tables: Mapping[str, pa.Table]) -> str:
    """Return the card of a run as Markdown with YAML front matter, as the Hugging Face Hub shows it.

    Args:
        run: the run.
        tables: its rows, by kind.
    """
    title = printable(f"{run.experiment} by pathnet")
    rows = sum(map(len, tables.values()))
    size = next((name for most, name in SIZES.items() if rows < most), LARGEST)
    # Without a default, load_dataset of the folder alone fails.
    stems = sorted(tables, key=lambda stem: (stem != "part", stem))
    subsets = [
        f"- config_name: {json.dumps(subset_of(stem))}\n  data_files: {json.dumps(f'data/{subset_of(stem)}.parquet')}"
        for stem in stems
    ]
    subsets[0] += "\n  default: true"
    front = [f"pretty_name: {_json(title)}", "tags:", "- pathnet", "- residual-networks", "- gradients"]
    front += ["size_categories:", f"- {json.dumps(size)}", "configs:", *subsets]
    first = subset_of(stems[0])
    sections = [
        f"# {title}",
        f"Measurements of residual networks by pathnet {_latest(run)}, after {PAPER}.",
        _reading(first),
        "## Rows and columns",
        "Blocks are numbered from 0, the first after the stem. Each column has its description as metadata of the "
        "Parquet file too.",
        *(text for stem in stems for text in _subset(stem, tables[stem])),
        "## What was measured",
        "\n".join(_measured(run.identity, run.planned)),
        "## Versions",
        _table(("started", "pathnet", "torch", "Python", "device"), map(_attempt, run.facts["attempts"])),
        "Before you publish this, name its licence and its authors.",
    ]
    return "\n".join(["---", *front, "---", "", "\n\n".join(sections), ""])


def _latest(run: Run) -> str:
    return printable(run.facts["attempts"][-1].get("pathnet", ""))


def _reading(subset: str) -> str:
    return "\n".join(
        [
            "```python",
            "from datasets import load_dataset",
            "",
            f'rows = load_dataset(".", "{subset}", split="train")  # in this folder, or its name on the Hub',
            "```",
            "",
            "```sql",
            f"SELECT * FROM 'data/{subset}.parquet';  -- DuckDB",
            "```",
        ]
    )


def _subset(stem: str, table: pa.Table) -> Iterator[str]:
    about = f": a row is {ABOUT[stem]}" if stem in ABOUT else ""
    yield f"### `{subset_of(stem)}`\n\n{len(table):,} rows{about}."
    yield _table(("column", "type", "meaning", "unit"), map(_column, table.schema))


def _column(field: pa.Field) -> tuple[str, ...]:
    metadata = {key.decode(): text.decode() for key, text in (field.metadata or {}).items()}
    return f"`{field.name}`", f"`{field.type}`", metadata.get("description", ""), metadata.get("unit", "")


def _measured(identity: Mapping[str, Any], planned: Mapping[str, int]) -> Iterator[str]:
    """Yield the network or networks, the data, and the plan."""
    networks = {"network": [identity["model"]]} if "model" in identity else identity.get("networks", {})
    for kind, seeds in networks.items():
        for seed, network in enumerate(seeds):
            name = f"{kind} {seed}" if len(seeds) > 1 else kind
            config = network.get("config")
            built = f"built as {_code(_json(config))}" if config else "a model of its author's"
            weights = _code(network.get("hash"))
            yield f"- **{printable(name)}**: {network['blocks']} blocks, {built}, weights {weights}"
    if "data" in identity:
        data = identity["data"]
        yield f"- **data**: {_code(data['name'])}, content {_code(data.get('hash'))}"
        if data.get("skipped"):
            yield f"- **images left out**: {len(data['skipped'])}, which could not be read"
    plan = {
        name: value for name, value in identity.items() if name not in ("experiment", "model", "networks", "data")
    }
    settings = {**plan, **planned}.items()
    yield f"- **plan**: {', '.join(f'{printable(name)} {_code(_json(value))}' for name, value in settings)}"


def _json(value: Any) -> str:
    # YAML reads an escaped character beyond the first 65,536 as two wrong ones.
    return json.dumps(value, ensure_ascii=False)


def _code(text: object) -> str:
    """Return Markdown that shows a text as it is, whatever backticks it holds."""
    shown = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def _attempt(attempt: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(attempt.get(name, "")) for name in ("started", "pathnet", "torch", "python", "device"))


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown; what files and users wrote cannot break it."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(
        f"| {' | '.join(printable(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines
    )
