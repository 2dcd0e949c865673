"""Frozen backbones that map uint8 photographs to regions."""
