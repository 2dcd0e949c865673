"""Tensors in, tensors out: the frozen backbones, the captioner, its search and its loss. No paths, files or flags."""


class ModelError(ValueError):
    """A model that cannot be built as asked; the message names the thing and what mends it."""
