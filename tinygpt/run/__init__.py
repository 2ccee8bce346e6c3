"""What keeps a training run alive and seen: checkpoints, processes, signals, logs, memory.  Decides no weight."""
