"""What is learnt: a file a task."""
