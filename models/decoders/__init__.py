"""Decoders: regions and words in, scores of the next word out."""
