"""Samples in and out: pictures from files and back."""
