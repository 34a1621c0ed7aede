"""``python -m pathnet`` is the command ``pathnet``."""

from pathnet.commands import main

main()
