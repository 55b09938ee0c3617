"""Training: stages as data, one step function a loss, one loop, one resumable state."""
