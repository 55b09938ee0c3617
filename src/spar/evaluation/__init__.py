"""Scores: the four benchmarks of the shapes world, their targets, and results files.

A benchmark calls a pipe-like object (`SparPipeline`, or anything with the same methods), runs the world's exact
detector on its outputs, and returns a `Result`. Nothing here trains or looks inside the model.
"""
