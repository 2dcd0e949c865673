"""Frozen backbones: uint8 photographs in, regions out."""
