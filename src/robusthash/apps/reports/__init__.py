"""Pages that open from disk, and figures for papers."""
