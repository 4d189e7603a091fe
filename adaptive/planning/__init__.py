"""What a run will need, told before it starts: batch arithmetic, memory, traffic, data, time."""
