"""Training as mathematics: batches, loss, optimizers, schedules, the step and the loop.  Imports nothing of run."""
