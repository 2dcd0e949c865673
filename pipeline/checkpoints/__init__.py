"""Checkpoint folders, safetensors files, and the Hugging Face hub."""
