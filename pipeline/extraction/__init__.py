"""Photographs to shards of a feature cache, and the care of a cache that exists."""
