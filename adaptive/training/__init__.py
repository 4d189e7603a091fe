"""Training: task, objective, engine, loop, checkpoint and the callbacks that watch."""
