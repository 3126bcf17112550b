"""Metrics: figures of what a model makes of rows, found by name; a file for each kind of target."""
