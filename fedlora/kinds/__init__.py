"""Kinds of adapter: how a weight's change is written, a file each."""
