"""Optimizers and schedulers by name, the moving average of weights, and mixed precision."""
