"""Anybody's model as a graph of operations, and the residual blocks in it."""
