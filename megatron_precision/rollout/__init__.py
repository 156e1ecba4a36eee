"""The engine on one rank: vLLM, seeded sampling, and the weights that its kernels read."""
