"""Decoders: they read regions and words, and predict the next word."""
