"""Patches upstream code: a patch is a value with its reason, and is applied loudly or not at all.

It also has the one patch that both platforms share, of Megatron's router without Transformer
Engine.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


class UpstreamChangedError(RuntimeError):
    """A name that a patch replaces is no longer where it was."""


@dataclass(frozen=True)
class Patch:
    """One replaced attribute of an upstream module or class.

    Attributes:
        owner: `package.module` or `package.module:Class` that holds the attribute.
        attribute: the name that is replaced.
        make: builds the replacement from the original.
        reason: what upstream does that does not hold here.
        upstream: the package and the version in which that was seen.
        may_be_missing: the patch defines a name that upstream uses and does not define.
    """

    owner: str
    attribute: str
    make: Callable[[Any], Any]
    reason: str
    upstream: str
    may_be_missing: bool = False


def apply(patches: Iterable[Patch]) -> None:
    """Apply every patch, or none; a second call would wrap the first one's replacements.

    Raises:
        UpstreamChangedError: naming every patch whose target has gone, before any is applied.
    """
    patches = tuple(patches)
    missing = []
    for patch in patches:
        try:
            owner = _resolve(patch.owner)
        except (ImportError, AttributeError) as error:
            missing.append(f"{patch.owner}: {error}")
            continue
        if not patch.may_be_missing and not hasattr(owner, patch.attribute):
            missing.append(f"{patch.owner} has no {patch.attribute!r}")
    if missing:
        raise UpstreamChangedError(
            "upstream names that this platform patches have gone:\n  "
            + "\n  ".join(missing)
            + "\nUse the pinned versions (requirements/), or update platform/ for the new ones."
        )
    for patch in patches:
        owner = _resolve(patch.owner)
        original = getattr(owner, patch.attribute, None)
        setattr(owner, patch.attribute, patch.make(original))


def _resolve(path: str) -> Any:
    module, _, cls = path.partition(":")
    owner = importlib.import_module(module)
    return getattr(owner, cls) if cls else owner


WITHOUT_TRANSFORMER_ENGINE = Patch(
    "megatron.core.transformer.moe.moe_utils",
    "te_general_gemm",
    lambda original: original,
    "the router uses this name unguarded; without Transformer Engine it is not defined",
    "megatron-core 0.16.1",
    may_be_missing=True,
)
