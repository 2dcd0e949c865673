"""The feature cache by the path that it had in version 0.1; it is data.cache.reader now."""

from data.cache.reader import FeatureCache, Rows

__all__ = ["FeatureCache", "Rows"]
