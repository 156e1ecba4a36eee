"""Hugging Face checkpoints to Megatron's `torch_dist` and back: bit-exact, streamed, verified.

    python -m tools.checkpoint_convert import HF_DIR MEGATRON_DIR
    python -m tools.checkpoint_convert export MEGATRON_DIR HF_DIR
    python -m tools.checkpoint_convert verify A B
    python -m tools.checkpoint_convert inspect DIR
    python -m tools.checkpoint_convert audit DIR --dtype fp16

Which tensor lies where is not decided here but in `megatron_precision/weights/`. Both formats are
read as Hugging Face tensors (`source.py`), in row blocks, so that memory does not depend on the
size of the model; `safetensors_folder.py` and `torch_dist_folder.py` are the two formats.
"""
