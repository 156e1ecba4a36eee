"""Measure one GPU, FP16 beside BF16, in order of priority; each result is written as it is done.

    python scripts/bench_gpu.py --out docs/benchmarks/raw/gpu
    .venv/bin/python scripts/bench_gpu.py --out /tmp/gpu --platform cpu --tiny     # the code alone

Every measure is a process of its own: memory is fresh, and one that fails leaves its message in
its file and the others alone. A file that is there with a result is not measured again, so that a
run that was cut short goes on. `--budget-s` ends the measure that is under way after so many
seconds, and starts no other. What a measure's libraries say is in its log.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_precision.gpu_bench.cases import CASES, Case, config, needs_gpu  # noqa: E402
from megatron_precision.platform.choice import VARIABLE, choose  # noqa: E402

CASE_LIMIT_S = 900


def main() -> int:
    """All measures; 1 where one failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the raw results")
    parser.add_argument("--platform", choices=("cpu", "cuda"), help="default: the engine's")
    parser.add_argument("--tiny", action="store_true", help="models of a million weights")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--list", action="store_true", help="names, in order; nothing is run")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.platform:
        os.environ[VARIABLE] = args.platform
    if args.measure:
        measure(next(case for case in CASES if case.name == args.measure), args.out, args.tiny)
        return 0
    chosen = [c for c in CASES if not args.only or c.name.startswith(tuple(args.only))]
    if args.list:
        print("\n".join(case.name for case in chosen))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    begin, failed = time.monotonic(), 0
    for case in chosen:
        if choose().name == "cpu" and needs_gpu(case):
            print(f"{case.name:48}left out: only a GPU can do it", flush=True)
            continue
        left_s = args.budget_s - (time.monotonic() - begin)
        if left_s <= 0:
            print(f"{case.name:48}not begun: the budget is spent", flush=True)
            continue
        failed += not run(case, args.out, args.tiny, min(left_s, CASE_LIMIT_S))
    return 1 if failed else 0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def has_result(path: Path) -> bool:
    """Whether a measure has come to its end."""
    return path.is_file() and "error" not in json.loads(path.read_text())


def run(case: Case, out: Path, tiny: bool, limit_s: float) -> bool:
    """One measure in a process of its own; whether there is a result."""
    path = out / f"{case.name}.json"
    if has_result(path):
        print(f"{case.name:48}there already", flush=True)
        return True
    command = [sys.executable, __file__, "--out", str(out), "--measure", case.name]
    environment = {
        **os.environ,
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "VLLM_LOGGING_LEVEL": "INFO",  # which kernels it takes
    }  # fmt: skip
    begin = time.monotonic()
    log = out / f"{case.name}.log"
    with log.open("wb") as file:
        try:
            code = subprocess.run(
                [*command, *(["--tiny"] if tiny else [])],
                env=environment, stdout=file, stderr=subprocess.STDOUT, timeout=limit_s,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = -1
    took = time.monotonic() - begin
    if has_result(path):
        # Libraries may yet fail as they leave the GPU; the numbers are there.
        ended = "" if code == 0 else f", and then exit code {code}, see {log}"
        print(f"{case.name:48}{took:6.0f} s{ended}", flush=True)
        return True
    last = log.read_text(errors="replace").strip().splitlines()[-1:] or [""]
    write(path, {"case": case.name, "error": f"exit code {code} after {took:.0f} s: {last[0]}"})
    print(f"{case.name:48}FAILED, see {log}", flush=True)
    return False


def measure(case: Case, out: Path, tiny: bool) -> None:
    """In the measure's own process: run it and write its result."""
    run_config = config(case, tiny=tiny, gpu=choose().name == "cuda")
    from megatron_precision.platform import startup

    startup.start(run_config.seed)
    from megatron_precision.config import to_dict
    from megatron_precision.gpu_bench.measures import MEASURES

    with tempfile.TemporaryDirectory() as folder:
        found = MEASURES[case.kind](run_config, Path(folder))
    facts = {
        "case": case.name,
        "command": shlex.join(["scripts/bench_gpu.py", *sys.argv[1:]]),
        "tiny": tiny,
        "platform": startup.describe(),
        "versions": startup.versions(),
        **found,
        "config": to_dict(run_config),
    }
    write(out / f"{case.name}.json", facts)


def write(path: Path, facts: dict[str, Any]) -> None:
    """A result, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
