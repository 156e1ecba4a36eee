"""An algorithm of your own: CISPO (arXiv 2506.13585, equations 4 and 5).

--algo examples/my_algorithm.py:CISPO

One function, which returns the loss of every token, and one row, which puts it together with the
parts that exist: advantages of groups, a correction for the engine's probabilities, aggregation.
"""

import torch

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.algorithms import Algorithm
from megatron_precision.rl.correction import PolicyInputs, clamped_exp
from megatron_precision.rl.losses import PolicyTerms


def cispo(inputs: PolicyInputs, constants: AlgorithmConfig) -> PolicyTerms:
    """Clip the ratio as a weight: loss = -sg(min(pi/pi_old, 1 + clip_high)) A log pi.

    Unlike in PPO a clipped token keeps its gradient. Tensors are [num_seqs, num_tokens] FP32,
    `inputs.advantages` is [num_seqs, 1]; padding is masked by the caller.
    """
    ratio = clamped_exp(
        (inputs.train_logprobs - inputs.old_logprobs).detach(), constants.log_weight_clamp
    )
    weight = ratio.clamp(max=1.0 + constants.clip_high)
    return PolicyTerms(
        loss=-weight * inputs.advantages * inputs.train_logprobs,
        clipped=torch.gt(ratio, weight),
        ratio=ratio,
        gradient_factor=weight,
    )


CISPO = Algorithm(
    name="CISPO",
    policy_loss=cispo,
    correction="none",
    aggregation="token-mean",
    source="arXiv 2506.13585",
    advantage="group_mean_std",
    reads_old_logprobs=True,
)
