"""How fast the cpu engine is on this processor, beside plain PyTorch: ``pathnet bench`` runs it all."""
