"""Collections of many images encoded in parts: read, encoded, written and put into an index."""
