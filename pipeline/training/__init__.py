"""Training: settings, setup, loop, objectives, rewards, validation, processes and log."""
