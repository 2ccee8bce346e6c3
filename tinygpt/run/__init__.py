"""What keeps a training run alive and seen: checkpoints, processes, loggers, memory and costs.  Decides no weight."""
