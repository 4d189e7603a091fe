"""What a training run will need, predicted before it starts: steps, memory, network traffic, data, time."""
