"""Audit of any search on photographs, without labels."""
