"""Embedded worlds: procedural data sets with an exact detector, which checks every claim offline."""
