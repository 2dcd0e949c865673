"""Captions from a decoder: beam search, sampling, constraints, ensembles."""
