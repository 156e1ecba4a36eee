"""Which region of which Hugging Face tensor lies where: on disk, in Megatron, in vLLM."""
