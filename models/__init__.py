"""Tensors in, tensors out: the frozen backbones, the captioner, its search and its loss.

No paths, files or flags.
"""

# beams, samples or captions of an image in commands: more need minutes and gigabytes for each
MOST_CAPTIONS = 1000


class ModelError(ValueError):
    """A model that cannot be built as asked; the message names the thing and what mends it."""
