"""Pure losses: tensors in, scalars or named terms out. No steps, devices or logging."""
