"""Data sets on disk: readers of all formats, order, mixture, and the loader."""
