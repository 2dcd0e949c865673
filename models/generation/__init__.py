"""Text generation with a decoder: beam search, sampling, constraints and ensembles."""
