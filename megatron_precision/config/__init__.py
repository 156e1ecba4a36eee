"""The configuration of a run: its frozen types, typed overrides, and errors of the user."""
