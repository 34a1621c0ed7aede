"""Accuracy of fused training, from the files of `benchmarks.digits_training`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
            _cell(row["measure"], row["eager"]),
            _range(row["measure"], row["spread"]),
            _cell(row["measure"], row["fused"]),
            "yes" if row["within"] else "**no**",
        ]
        for row in results["comparisons"]
    ]
    network, seeds = results["network"], results["comparisons"][0]["seeds"]
    header = ["mean over seeds (least to most)", "PyTorch's operators", "their spread", "fused kernels", "within it"]
    return (
        f"{sentence(results)}, ResNet-{network['depth']} of width {network['width']}, {results['data']}, "
        f"{results['epochs']} epochs, {seeds} seeds ({file_names([file])}):\n\n{table(header, rows)}"
    )


def _cell(measure: str, values: Mapping[str, float]) -> str:
    return f"{_show(measure, values['mean'])} ({_range(measure, (values['least'], values['most']))})"


def _range(measure: str, ends: Sequence[float]) -> str:
    return " to ".join(_show(measure, end) for end in ends)


def _show(measure: str, value: float) -> str:
    return percent(value) if measure == "test_accuracy" else number(value)


TABLES = {"trained": trained}
"""Tables by name."""
