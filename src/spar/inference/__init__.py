"""Inference: the pipeline of the four tasks, its outputs, image files, and savings of memory."""
