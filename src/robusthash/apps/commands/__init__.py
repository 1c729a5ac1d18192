"""The commands of ``robusthash``, one file for each group; they parse, show, and call what does the work."""
