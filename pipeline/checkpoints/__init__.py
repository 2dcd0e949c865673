"""Checkpoint folders, tensor files and the hub."""
