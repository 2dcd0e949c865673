"""Benchmarks, one script per claim: `python -m benchmarks.NAME [--json FILE]`."""
