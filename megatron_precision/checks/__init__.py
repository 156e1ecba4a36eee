"""Everything that can refuse a run, before any engine loads."""
