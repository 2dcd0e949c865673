"""Read and write data: sources of photographs and captions, vocabularies, the feature cache.

This package uses no models and no devices.
"""


class DataError(ValueError):
    """Invalid input. The message names the file and the place, and suggests a fix."""
