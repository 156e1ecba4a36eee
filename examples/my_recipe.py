"""A recipe of your own: the tiny dense model on sums of four terms, in fewer iterations.

python launch.py examples/my_recipe.py --precision bf16 --out runs/mine
"""

import dataclasses

from megatron_precision.config.schema import RunConfig
from recipes.sanity import tiny_dense


def recipe() -> RunConfig:
    """Return a complete configuration; `--precision`, `--algo` and `--set` change it."""
    base = tiny_dense()
    return dataclasses.replace(
        base,
        task=dataclasses.replace(base.task, difficulty=4),
        train=dataclasses.replace(base.train, iterations=8),
    )
