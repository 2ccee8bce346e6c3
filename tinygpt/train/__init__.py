"""Training: batches, loss, optimizer, schedules, checkpoints and the loop."""
