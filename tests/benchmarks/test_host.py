"""The findings of `benchmarks.host` without a GPU, except times, which depend on the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

from benchmarks.cases import REHEARSAL  # noqa: E402
from benchmarks.host import GOALS_MS, host  # noqa: E402


def test_a_batch_is_replayed_in_a_few_operations_whatever_the_depth() -> None:
    findings = host(replace(REHEARSAL, depth=14))
    assert findings["paths"] == 7 and findings["goals_ms"] == GOALS_MS
    rows = {(row["engine"], row["bn"], row["precision"]): row for row in findings["rows"]}
    assert len(rows) == 6
    for (engine, bn, _), row in rows.items():
        if engine == "cuda":
            assert row["launched"]["launches"] == 2 and row["launched"]["operations"] < 60
            continue
        # Two convolutions a block, the other branch of two blocks that change the shape, and the norms. In BN mode
        # `batch` the means of each, which do not end in a skip without a projection, and those folded into weights.
        assert row["launched"]["launches"] == (6 * 2 + 2 + 1 if bn == "running" else 6 * 2 * 3 + 2 * 2 + 1)
        replayed = row["replayed"]
        # A graph takes the kernels that there are already.
        assert replayed["launches"] == replayed["compiled"] == 0 < row["launched"]["compiled"]
        assert replayed["operations"] < 90
        assert 0 < row["plan_ms"] < replayed["batch_ms"] and 0 < replayed["record_ms"] < row["launched"]["record_ms"]
