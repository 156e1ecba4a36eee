"""Measures of one GPU, FP16 beside BF16; the same code runs tiny on the CPU, to prove itself."""
