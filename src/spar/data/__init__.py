"""Data sets on disk: readers of every format, order, mixture, and the loader."""
