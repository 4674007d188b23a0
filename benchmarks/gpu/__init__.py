"""What `benchmarks.gpu_all` runs on a CUDA device."""
