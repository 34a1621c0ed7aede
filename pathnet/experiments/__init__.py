"""One driver a figure or table of the paper."""
