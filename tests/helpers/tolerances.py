"""Maximum relative errors of results, each with its reason."""

EXACT_WALK = 1e-10
"""float64 against float64: rounding along a few dozen operations."""

FLOAT32_BATCH_NORM = 1e-5
"""A float32 pass's batch norm against the float64 pass on the same record."""

FLOAT32_SAMPLE_NORM = 1e-4
"""A float32 pass's norm of one sample."""

FLOAT32_WALK = 1e-5
"""A float32 pass's whole result for one sample, back or forward, on random plans: some ten roundings of 2^-24 a
block, which branches that cancel amplify."""

ROUNDED_WALK = 4
"""Maximum ratio of the error to that of a float64 pass with the same roundings, one by one in another order; where
numbers are rounded to bfloat16, or to two terms of it, and the loss depends on a random plan's conditioning."""

BFLOAT16_BATCH_NORM = 5e-3
"""A bfloat16 pass's batch norm against the float64 pass on the same record."""

BFLOAT16_SAMPLE_NORM = 2e-2
"""A bfloat16 pass's norm of one sample."""

BFLOAT16_GRADIENT = 5e-2
"""A bfloat16 pass's gradient of one sample as a vector: norms average roundings of 2^-9, directions do not."""

FORWARD = 1e-4
"""A float32-accurate forward pass against float64, over the whole output of a deep network."""
