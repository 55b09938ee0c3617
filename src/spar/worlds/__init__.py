"""Embedded worlds: procedural data sets with an exact detector, so that a program can check every claim, offline."""
