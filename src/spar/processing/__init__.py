"""What goes into the model: images as tensors, prompts and conversations as tokens."""
