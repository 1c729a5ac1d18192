"""``python -m robusthash``."""

from robusthash.apps.cli import main

if __name__ == "__main__":  # processes of a sweep import this file
    main()
