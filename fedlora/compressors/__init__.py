"""Ways to make the frozen base smaller: one file each, found by name."""
