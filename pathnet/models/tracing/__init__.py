"""Anybody's model as a graph of operations."""
