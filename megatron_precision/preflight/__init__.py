"""What a run will take, estimated before it starts: memory, traffic, time, and a layout."""
