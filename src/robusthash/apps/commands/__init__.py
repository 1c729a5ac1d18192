"""The verbs of ``robusthash``, one file each; they parse, show, and call the function that does the work."""
