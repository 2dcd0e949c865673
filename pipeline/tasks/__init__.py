"""Tasks: what is learnt of an image, one file a task."""
