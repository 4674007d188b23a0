"""Checkpoints: reads and writes configurations and weights of our own and the released format, builds the network."""
