"""Mechanisms: sampling, clipping, noise and the event that accounts for them, coupled; a file each."""
