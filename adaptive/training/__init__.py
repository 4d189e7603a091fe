"""Training: the loop over steps, losses, the engine, checkpoints, callbacks and supervision."""
