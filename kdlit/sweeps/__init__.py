"""Sweeps: trying values of any settings, and choosing on the held-out validation pictures alone."""

from kdlit.sweeps.command import main

__all__ = ["main"]
