"""The stages (`python -m pipeline.extract`, `train`, `evaluate`, `caption`, `demo`) and what they share."""

import os

# Before torch starts its threads: a thread that waits for the other one sleeps soon instead of spinning. With a busy
# neighbour on two cores a training step took 4.1 s spinning and 0.4 s so; on a quiet machine they are equal.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
