"""Checkpoint folders, tensor files and the hub: records that check themselves."""
