"""Timings of the engine for any model on a GPT, ViT-Tiny and ConvNeXt-Tiny, against what a user writes in PyTorch."""
