"""Replays a dumped iteration and finds the token and the layer at which the sides part."""
