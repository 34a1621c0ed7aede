"""Accuracy of fused training, from the files of `benchmarks.digits_training`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.tables.markdown import file_names, number, percent, table
from benchmarks.tables.processors import sentence

__all__ = ["TABLES"]

Results = dict[str, Any]

TITLES = {"test_accuracy": "test accuracy", "test_loss": "test loss", "train_loss": "training loss, last epoch"}


def trained(files: Mapping[str, Results]) -> str:
    """Return the measures of networks trained by PyTorch's operators and by fused kernels, as means and ranges."""
    ((file, results),) = files.items()
    rows = [
        [
            f"{TITLES[row['measure']]}, {row['precision']}",
            *(_cell(row["measure"], row[trainer]) for trainer in ("eager", "fused")),
            "yes" if row["within"] else "**no**",
        ]
        for row in results["comparisons"]
    ]
    network, seeds = results["network"], results["comparisons"][0]["seeds"]
    header = ["mean over seeds (least to most)", "PyTorch's operators", "fused kernels", "mean within the range"]
    return (
        f"{sentence(results)}, ResNet-{network['depth']} of width {network['width']}, {results['data']}, "
        f"{results['epochs']} epochs, {seeds} seeds ({file_names([file])}):\n\n{table(header, rows)}"
    )


def _cell(measure: str, values: Mapping[str, float]) -> str:
    show = percent if measure == "test_accuracy" else number
    return f"{show(values['mean'])} ({show(values['least'])} to {show(values['most'])})"


TABLES = {"trained": trained}
"""Tables by name."""
