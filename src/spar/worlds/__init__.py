"""Embedded worlds: procedural data sets with an exact judge, so that a program can check every claim, offline."""
