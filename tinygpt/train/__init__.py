"""The mathematics of training: batches, loss, optimizers, schedules, the step, the loop.  Imports nothing from run."""
