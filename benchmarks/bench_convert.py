"""The converter against `cp` of the same bytes, and its peak memory, at two sizes.

    .venv/bin/python benchmarks/bench_convert.py --out docs/benchmarks/raw/convert.json

A synthetic checkpoint with the layers of Qwen3-14B (hidden 5120, MLP 17408, 40 heads, 8 KV heads;
a smaller vocabulary) is copied, imported and exported in turn. Every copy ends on the disk (fsync).
Times are medians over the rounds, of whole commands: some 3 s of each are Python and torch
starting, which `inspect` shows. Memory is each command's largest resident set.

A child's figure for that begins with its parent's, so this script imports no torch; it makes the
checkpoint in a process of its own (`--make`).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_precision.config.schema import ModelConfig  # noqa: E402
from megatron_precision.layouts.architectures import (  # noqa: E402
    QWEN3_14B,
    hf_shapes,
)
from megatron_precision.layouts.hf_config import hf_config  # noqa: E402

# Tensors of the layers' real sizes; a vocabulary that does not outweigh a few layers.
MODEL = dataclasses.replace(QWEN3_14B, vocab_size=16384, tie_word_embeddings=True)
TOOL = [sys.executable, "-m", "tools.checkpoint_convert"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 9], help="0.62 GiB each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--make", type=Path, help="only make a checkpoint there")
    args = parser.parse_args()
    if args.make:
        make_checkpoint(args.make, dataclasses.replace(MODEL, num_hidden_layers=args.layers[0]))
        return
    if args.out is None:
        parser.error("--out is missing")
    found: dict[str, Any] = {
        "command": " ".join(["benchmarks/bench_convert.py", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
    }
    for layers in args.layers:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            found[f"{layers} layers"] = measure(Path(folder), layers, args.rounds)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(found[f"{layers} layers"]["medians"], indent=1), flush=True)


def measure(folder: Path, layers: int, rounds: int) -> dict[str, Any]:
    """All commands, round by round."""
    hf, megatron = folder / "hf", folder / "megatron"
    run([sys.executable, str(Path(__file__)), "--make", str(hf), "--layers", str(layers)])
    shapes = hf_shapes(dataclasses.replace(MODEL, num_hidden_layers=layers))
    size = 2 * sum(math.prod(shape) for shape in shapes.values())
    run([*TOOL, "import", str(hf), str(megatron)])
    out = folder / "out"
    commands = {
        "cp": ["sh", "-c", f"cp -r {hf} {out} && sync {out}/*"],
        "import": [*TOOL, "import", str(hf), str(out)],
        "import, 2 workers": [*TOOL, "import", str(hf), str(out), "--workers", "2"],
        "export": [*TOOL, "export", str(megatron), str(out)],
        "export, 2 workers": [*TOOL, "export", str(megatron), str(out), "--workers", "2"],
        "inspect": [*TOOL, "inspect", str(hf)],
        "verify": [*TOOL, "verify", str(hf), str(megatron)],
    }
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, words in commands.items():
            samples[name].append(run(words))
            shutil.rmtree(out, ignore_errors=True)
    copied = statistics.median(sample["s"] for sample in samples["cp"])
    medians = {
        name: {
            "s": round(seconds := statistics.median(sample["s"] for sample in rows), 2),
            "mib_per_s": round(size / seconds / 2**20),
            "fraction_of_cp": round(copied / seconds, 2),
            "peak_gib": round(max(sample["peak_gib"] for sample in rows), 2),
        }
        for name, rows in samples.items()
    }
    return {"gib": round(size / 2**30, 2), "medians": medians, "samples": samples}


def run(words: list[str]) -> dict[str, float]:
    """Seconds of a command, and the largest resident set of it and its children."""
    began = time.perf_counter()
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    if status != 0:
        raise SystemExit(f"{' '.join(words)}: status {status}")
    return {"s": seconds, "peak_gib": usage.ru_maxrss * 1024 / 2**30}


def make_checkpoint(folder: Path, model: ModelConfig) -> None:
    """A checkpoint of normal numbers in BF16."""
    import torch

    from tools.checkpoint_convert.blocks import TensorInfo, row_blocks
    from tools.checkpoint_convert.safetensors_folder import SafetensorsWriter

    folder.mkdir()
    tensors = {name: TensorInfo(s, torch.bfloat16) for name, s in hf_shapes(model).items()}
    longest = max(torch.Size(info.shape).numel() for info in tensors.values())
    noise = torch.randn(longest, generator=torch.Generator().manual_seed(0)).bfloat16()
    writer = SafetensorsWriter(folder, tensors, 2**30)
    for shard, names in enumerate(writer.shards):
        blocks = (
            (name, noise[: (end - begin) * tensors[name].shape[-1]])
            for name in names
            for begin, end in row_blocks(tensors[name])
        )
        writer.write_shard(
            shard, ((n, b[: torch.Size(tensors[n].shape).numel()]) for n, b in blocks)
        )
    writer.write_index()
    (folder / "config.json").write_text(json.dumps(hf_config(model, "bfloat16")))


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
