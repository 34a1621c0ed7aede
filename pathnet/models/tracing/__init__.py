"""Any PyTorch model as a graph of operations, and the residual blocks in that graph."""
