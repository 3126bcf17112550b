"""The round loop, its clock, its checkpoints."""
