"""The places of what we read are found in vLLM 0.32's order, in 0.26's, and in no unclear one."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.v1.outputs import LogprobsLists, LogprobsTensors
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from megatron_precision.platform.patching import UpstreamChangedError
from megatron_precision.rollout.vllm_versions import BookkeepingPlaces, bookkeeping_places

# As vllm 0.26.0 annotates it; the installed 0.32 has one value more before the log-probs.
IN_0_26 = tuple[
    dict[str, int],
    LogprobsLists | None,
    list[list[int]],
    dict[str, LogprobsTensors | None],
    list[str],
    dict[str, int],
    list[int],
]


def test_the_installed_version_has_its_places() -> None:
    assert bookkeeping_places() == BookkeepingPlaces(logprobs=2, tokens=3, requests=5)


@pytest.mark.parametrize(
    ("returned", "places"),
    [
        (IN_0_26, BookkeepingPlaces(logprobs=1, tokens=2, requests=4)),
        (tuple[LogprobsLists | None, list[list[int]], list[str], list[str]], None),
        (tuple[LogprobsLists, list[list[int]], list[str]], None),
    ],
)
def test_another_version_has_its_own_or_is_refused(
    returned: Any, places: BookkeepingPlaces | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(GPUModelRunner._bookkeeping_sync.__annotations__, "return", returned)
    if places is None:
        with pytest.raises(UpstreamChangedError, match=r"requests|logprobs"):
            bookkeeping_places()
    else:
        assert bookkeeping_places() == places
