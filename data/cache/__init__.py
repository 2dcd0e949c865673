"""The feature cache on disk: reading, writing, claims."""
