"""What only a GPU can show: tests there, memory checks, and timings against plain PyTorch; see `benchmarks.gpu`."""
