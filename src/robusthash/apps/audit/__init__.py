"""Audit of any search on photographs."""
