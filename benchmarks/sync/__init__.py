"""What a sync between two layouts takes, measured on this machine."""
