"""What a run writes: metrics, their sinks, and dumps of iterations."""
