"""Extraction of photographs to the shards of a feature cache, and maintenance of caches."""
