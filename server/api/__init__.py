"""The HTTP endpoints, one module per group of routes, and nothing else."""
