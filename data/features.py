"""The import path of the feature cache in version 0.1. It is now data.cache.reader."""

from data.cache.reader import FeatureCache, Rows

__all__ = ["FeatureCache", "Rows"]
