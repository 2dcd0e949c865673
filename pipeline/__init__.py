"""The stages (`python -m pipeline.extract`, `train`, `evaluate`, `caption`, `demo`) and what they share."""
