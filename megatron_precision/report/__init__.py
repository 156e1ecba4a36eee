"""Pages and figures of finished runs, read from their metrics."""
