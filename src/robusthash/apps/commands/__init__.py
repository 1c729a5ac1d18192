"""The verbs of ``robusthash``: they parse, show, and call the function that does the work."""
