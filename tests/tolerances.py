"""How far results may lie from the truth: relative errors, each with its reason."""

EXACT_WALK = 1e-10
"""float64 against float64: rounding along a few dozen operations."""

FLOAT32_BATCH_NORM = 1e-5
"""A float32 walk's batch norm against the float64 walk on the same record."""

FLOAT32_SAMPLE_NORM = 1e-4
"""A float32 walk's norm of one sample."""
