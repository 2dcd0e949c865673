"""Files in, arrays out: sources of photographs and captions, the vocabulary, the feature cache.

No model, no device.
"""


class DataError(ValueError):
    """Input that cannot be used; the message names the thing, the place and what mends it."""
