"""Prompts, tokens and tasks: what a run trains on, and in which order."""
