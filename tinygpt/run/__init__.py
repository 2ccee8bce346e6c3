"""What keeps a training run alive and visible: checkpoints, processes, loggers, memory and costs."""
