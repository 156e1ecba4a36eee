"""Measures and their raw results. Nothing here is part of the package."""
