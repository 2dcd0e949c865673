"""Extraction of photographs into the shards of a feature cache, and maintenance of caches."""
