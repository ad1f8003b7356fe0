"""The trainer and its engine, optimizer, schedule, checkpoints, recovery and events."""
