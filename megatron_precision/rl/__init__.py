"""Algorithms as pure functions on tensors: advantages, losses, corrections, mismatch."""
