"""Sampling and the jit-compiled generate loop."""
