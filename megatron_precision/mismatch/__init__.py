"""The mismatch of any checkpoint: the same responses scored by both sides in several dtypes."""
