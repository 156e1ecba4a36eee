"""Workers that score are forked from a server that has loaded their scorer alone, as in a run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed import harness


@pytest.fixture(scope="package", autouse=True)
def _a_server_of_its_own() -> Iterator[None]:
    # The server of the ranks' tests has loaded PyTorch. Where that is built for CUDA, which is what
    # the package index has, its libraries alone take more address space than a worker may have.
    harness.stop_server()
    yield
    harness.stop_server()
