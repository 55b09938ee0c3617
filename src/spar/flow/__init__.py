"""Rectified flow: the path and its times, samplers, guidance."""
