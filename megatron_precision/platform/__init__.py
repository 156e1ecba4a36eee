"""What the code runs on: a CUDA GPU, or a CPU as a platform of its own right."""
