"""``python -m robusthash``."""

from robusthash.apps.cli import main

main()
