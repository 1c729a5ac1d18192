"""Self-contained HTML: the parts, the report of a run, the story of the demo."""
