"""A run's folder and its checkpoints: what is written, when it is whole, and who may read it."""
