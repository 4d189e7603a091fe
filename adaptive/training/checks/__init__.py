"""What was asked for compared with what a phase will really do: optimizer, schedule, losses, settings without use."""
