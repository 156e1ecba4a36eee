"""The training loop and all that one run on one rank needs."""
