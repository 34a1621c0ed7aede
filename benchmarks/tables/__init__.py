"""Markdown tables of the README and the documentation, written from results files.

A table stands on a page between two comments; the first names it and its files below ``benchmarks/results``::

    <!-- table: speed cpu/A.json cpu/B.json -->
    ...
    <!-- end -->

``python -m benchmarks.tables`` rewrites every such table, and ``--check`` names the pages that it would change.
"""
