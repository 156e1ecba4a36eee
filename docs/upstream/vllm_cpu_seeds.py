"""vLLM 0.32.0, CPU: the sampler asks each request's generator for one number, each step.

    .venv/bin/python docs/upstream/vllm_cpu_seeds.py

Prints the seconds of 70 steps of 256 requests, drawn as `TopKTopPSampler.forward_cpu` draws them
and drawn at once, and that both give the same seeds.
"""

import time

import torch

REQUESTS, STEPS = 256, 70


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(request) for request in range(REQUESTS)]


torch.set_num_threads(1)
begin, live = time.perf_counter(), generators()
one_by_one = torch.empty(STEPS, REQUESTS, dtype=torch.long)
for step in range(STEPS):
    for request, generator in enumerate(live):
        one_by_one[step, request] = torch.randint(0, 2**31, (1,), generator=generator).item()
middle, live = time.perf_counter(), generators()
at_once = torch.stack([torch.randint(0, 2**31, (STEPS,), generator=g) for g in live], dim=1)
end = time.perf_counter()
print(f"one by one {middle - begin:.3f} s, at once {end - middle:.3f} s")
print("the same seeds" if torch.equal(one_by_one, at_once) else "OTHER SEEDS")
