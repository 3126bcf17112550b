"""Scenarios that ship with fedlora: `fedlora list scenarios`."""
