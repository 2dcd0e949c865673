"""The stages (`python -m pipeline.extract`, `train`, `evaluate`, `caption`, `demo`) and what they share."""

import os

# Before torch starts its threads: how long one that waits for the other spins before it sleeps, in turns of a loop. With a busy
# neighbour on two cores spinning cost 10 times the step (an AMD EPYC) and 1.6 times (an Intel Xeon); sleeping at once (1000)
# costs a quiet Xeon 1.6 times.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
