"""``python -m pathnet`` is the command ``pathnet``."""

from pathnet.cli import main

main()
