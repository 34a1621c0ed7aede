"""Timings of the cpu engine on this processor against plain PyTorch: ``pathnet bench`` runs all of them."""
