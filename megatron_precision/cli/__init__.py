"""The commands of `python -m megatron_precision` and `launch.py`, one file each."""
