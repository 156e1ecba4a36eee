"""`python -m megatron_precision`; the guard keeps spawned helper processes from running it."""

from __future__ import annotations

from megatron_precision.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
