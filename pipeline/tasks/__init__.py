"""The tasks. Each task is one file."""
