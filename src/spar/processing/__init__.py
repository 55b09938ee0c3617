"""Inputs of the model: images as tensors, prompts and conversations as tokens."""
