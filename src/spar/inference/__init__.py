"""A finished model at work: the pipeline of the four tasks, its outputs, and less memory for it."""
