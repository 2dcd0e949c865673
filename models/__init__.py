"""Models that map tensors to tensors: backbones, decoders, text generation and losses.

This package reads no files and no command-line options.
"""

# Largest number of beams, samples or captions of one image. More need minutes and gigabytes each.
MAX_CAPTIONS = 1000


class ModelError(ValueError):
    """A model cannot be built or run. The message names the setting and a fix."""
