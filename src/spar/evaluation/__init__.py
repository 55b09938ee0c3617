"""Scores and reports: the four benchmarks of the shapes world, results files, and one self-contained HTML page.

A benchmark asks a pipe-like object (`SparPipeline`, or anything with the same methods) for its outputs, has the world's
exact detector read them, and returns a `Result`. Nothing here trains, and nothing here looks inside the model.
"""
