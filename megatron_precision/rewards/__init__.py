"""Grades responses, in worker processes that a hostile answer cannot take down."""
