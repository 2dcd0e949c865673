"""Files in, arrays out: sources of photographs and captions, the vocabulary, the feature cache.

No model, no device.
"""


class DataError(ValueError):
    """Invalid input; the message names the file, the place and a fix."""
