"""Stages of an experiment on run directories, and what compares many runs."""
