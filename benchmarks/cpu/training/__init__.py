"""The step that times training: pathnet's fused blocks against PyTorch's forms, each checked before it is timed."""
