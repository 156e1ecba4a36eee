"""PyTorch 2.13.0, CPU: `log_softmax` in FP32 over a large vocabulary is too high, for every token.

    .venv/bin/python docs/upstream/torch_cpu_log_softmax.py

Prints the mean error against FP64 of `log_softmax` and of a log of `exp().sum()`, and the share of
tokens for which each is too high.
"""

import torch

ROWS, VOCABULARY = 64, 49152

logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0)) * 4
exact = logits.double().log_softmax(-1)
shifted = logits - logits.amax(-1, keepdim=True)
pairwise = shifted - shifted.exp().sum(-1, keepdim=True).log()
for name, found in (("log_softmax", logits.log_softmax(-1)), ("log(exp().sum())", pairwise)):
    error = (found - exact).mean(-1)
    print(f"{name:18} {error.mean():+.1e}, too high in {(error > 0).double().mean():.0%} of rows")
