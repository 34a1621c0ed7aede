"""Notebooks of the documentation: run from top to bottom by this interpreter, stored clean, and compared.

``make notebooks`` runs all of them and stores their outputs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from base64 import b64decode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from PIL import Image

from helpers import ROOT
from helpers.outputs import same_output

__all__ = ["FILES", "cleaned", "differences", "executed", "stored", "traces", "written"]

FOLDER = ROOT / "docs" / "notebooks"
FILES = sorted(FOLDER.glob("*.ipynb"))
SECONDS = 300
"""Time that a cell may take, on a machine that does much else."""
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SHOWN = ("image/png", "text/html", "text/plain")
"""Forms of an output that are stored."""
SIZES = ("width", "height")
SIZE_TOLERANCE = 0.05
"""Relative difference of the sides of a figure, whose margins depend on the labels of its axes."""
SATURATION = 80
"""Saturation (0 to 255) of the pixels that show data; axes and labels are grey."""
MOST_COLOUR = 1.6
"""Largest ratio of two figures' shares of coloured pixels. Between instruction sets it reaches 1.3."""
FARTHEST = 0.15
"""Largest distance of two figures' centres of colour, as a part of each side; 0.10 between instruction sets."""
MACHINES_PATHS = re.compile(
    "|".join([r"(?<![\w.:/])/(?:home|opt|private|root|tmp|usr|var|Users)/", re.escape(str(ROOT)), r"[A-Z]:\\\w"])
)
PROGRESS = re.compile(r"^.*: \d+/\d+")
"""The name and the counts of a bar; the note after them may tell a loss, which depends on the processor."""


class ThisPython(AsyncKernelManager):
    """The kernel of this interpreter, whatever kernels are registered, over sockets in a folder."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], **KERNEL)


def executed(notebook: Any, folder: Path, kind: type[NotebookClient] = NotebookClient) -> NotebookClient:
    """Run a notebook in place, in a folder, and return the client that ran it.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raises an error.
    """
    environment = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "MPLBACKEND")
    }
    environment |= {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / ".ipython"), "OMP_NUM_THREADS": "1"}
    # Paths of sockets must be short, and those of pytest's folders are not.
    with tempfile.TemporaryDirectory() as sockets:
        manager = ThisPython(connection_file=f"{sockets}/kernel.json", transport="ipc")
        place = {"metadata": {"path": str(folder)}}
        running = kind(notebook, manager, timeout=SECONDS, resources=place, coalesce_streams=True)
        running.execute(env=environment, cleanup_kc=True)
    return running


def cleaned(notebook: Any, name: str) -> Any:
    """Return a notebook without what differs from run to run or from machine to machine."""
    cells = []
    for number, cell in enumerate(notebook.cells):
        clean: dict[str, Any] = {"cell_type": cell.cell_type, "id": f"{name}-{number}", "metadata": {}}
        clean["source"] = cell.source
        if cell.cell_type == "code":
            clean |= {"execution_count": cell.execution_count, "outputs": [_clean(each) for each in cell.outputs]}
        cells.append(clean)
    metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    return nbformat.from_dict({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5})


def _clean(output: Any) -> Any:
    if "data" not in output:
        return output
    forms = {form: output.data[form] for form in SHOWN if form in output.data}
    sizes = {
        form: {side: of_form[side] for side in SIZES if side in of_form}
        for form, of_form in output.metadata.items()
        if form in forms and isinstance(of_form, dict)
    }
    return {**output, "data": forms, "metadata": sizes}


def written(notebook: Any) -> str:
    """Return a notebook as the text of its file."""
    nbformat.validate(notebook)
    return str(nbformat.writes(notebook)).rstrip() + "\n"


def stored(file: Path) -> Any:
    """Return the notebook in a file."""
    return nbformat.read(file, as_version=4)


def traces(notebook: Any) -> list[str]:
    """Return what a notebook shows of the machine that ran it: paths in outputs, and all that went to stderr."""
    problems = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            texts = [output.get("text", ""), *(output.get("data", {}).get(form, "") for form in SHOWN[1:])]
            problems += [f"cell {number}: {match[0]}" for text in texts if (match := MACHINES_PATHS.search(text))]
            if output.get("name") == "stderr" or output.output_type == "error":
                problems.append(f"cell {number}: {texts[0] or output.output_type}")
    return problems


def differences(notebook: Any, fresh: Any) -> list[str]:
    """Return where the outputs of a notebook differ from those of a fresh run, in words."""
    problems = []
    for number, (before, after) in enumerate(zip(notebook.cells, fresh.cells, strict=True)):
        shown, printed = ([_seen(output) for output in cell.get("outputs", ())] for cell in (before, after))
        if len(shown) != len(printed) or not all(map(_same, shown, printed)):
            problems.append(f"cell {number} shows\n{_in_words(printed)}\nbut the file holds\n{_in_words(shown)}")
    return problems


@dataclass(frozen=True)
class Picture:
    """Features of an image that are compared.

    Attributes:
        size: width and height in pixels.
        colour: share of the pixels that have a colour.
        centre: their mean place, as parts of the width and of the height.
    """

    size: tuple[int, int]
    colour: float
    centre: tuple[float, float]


def _picture(png: str) -> Picture:
    image = Image.open(BytesIO(b64decode(png)))
    coloured = np.asarray(image.convert("HSV"))[..., 1] > SATURATION
    y, x = np.nonzero(coloured)
    width, height = image.size
    centre = (float(x.mean()) / width, float(y.mean()) / height) if x.size else (0.0, 0.0)
    return Picture(image.size, float(coloured.mean()), centre)


def _seen(output: Any) -> str | Picture:
    """Return what is compared of an output: its text, or its image."""
    if "data" not in output:
        return str(output.get("text") or output)
    if (png := output.data.get("image/png")) is not None:
        return _picture(png)
    text = str(output.data.get("text/plain", ""))
    bar = PROGRESS.match(text) if "<progress" in output.data.get("text/html", "") else None
    return bar[0] if bar else text


def _same(before: str | Picture, after: str | Picture) -> bool:
    if isinstance(before, str) or isinstance(after, str):
        return isinstance(before, str) and isinstance(after, str) and same_output(before, after)
    less, more = sorted((before.colour, after.colour))
    return (
        all(abs(one - other) <= SIZE_TOLERANCE * one for one, other in zip(before.size, after.size, strict=True))
        and more <= MOST_COLOUR * less
        and all(abs(one - other) <= FARTHEST for one, other in zip(before.centre, after.centre, strict=True))
    )


def _in_words(outputs: list[str | Picture]) -> str:
    return "\n".join(map(str, outputs))


if __name__ == "__main__":
    for file in FILES:
        notebook = stored(file)
        with tempfile.TemporaryDirectory() as folder:
            executed(notebook, Path(folder))
        if problems := traces(notebook):
            sys.exit(f"{file.name}: " + "\n".join(problems))
        file.write_text(written(cleaned(notebook, file.stem)))
        print(f"{file.relative_to(ROOT)}: {file.stat().st_size // 1000} KB")
