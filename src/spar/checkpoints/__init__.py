"""Weights on disk: the SPAR folder, the Hub, LoRA, and checkpoints in other formats."""
