"""Decode steps prepared ahead: captured CUDA graphs, and rows that the compiled kernels step at once."""
