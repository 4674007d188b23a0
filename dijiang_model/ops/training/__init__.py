"""The attention as a differentiable operation, for training."""
