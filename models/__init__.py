"""Models: tensors in, tensors out. Backbones, decoders, generation and losses.

No paths, files or command-line flags.
"""

# largest number of beams, samples or captions per image: more take minutes and gigabytes
MOST_CAPTIONS = 1000


class ModelError(ValueError):
    """A model that cannot be built; the message names the reason and a fix."""
