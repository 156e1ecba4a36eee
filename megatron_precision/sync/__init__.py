"""Sends the trainer's weights into the engine's parameters: the plan, its execution, its proof."""
