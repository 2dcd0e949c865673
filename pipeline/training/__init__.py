"""The training run: configuration, loop, objectives, rewards, processes, log."""
