"""Who reads the metrics events while a run goes on: console, Weights & Biases, TensorBoard.

A sink has no training values of its own: all it knows is in the events that `MetricsWriter`
hands it. wandb and TensorBoard are imported when they are asked for, so that a run without
them neither needs nor waits for them.
"""

from __future__ import annotations

import importlib.util
import json
import math
import secrets
import sys
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from megatron_precision.config.schema import SinkConfig
from megatron_precision.observe.metrics import Sink

# wandb's own limit is 90 s, for which every rank would wait.
_REACHED_WITHIN_S = 30

__all__ = ["ConsoleSink", "Sink", "TensorBoardSink", "WandbSink", "make_sinks"]


def make_sinks(config: SinkConfig, run_dir: Path, total_iterations: int) -> list[Sink]:
    """Make the sinks that a run's config asks for; the console is always the first.

    Args:
        config: which of wandb and TensorBoard to feed.
        run_dir: the run's folder; what a sink writes lies inside it.
        total_iterations: for the progress bar.

    Raises:
        ValueError: where a sink's package is not installed; all of them are listed.
    """
    missing = []
    if config.wandb != "off" and not _is_installed("wandb"):
        missing.append("sinks.wandb needs the package wandb")
    if config.tensorboard and not (_is_installed("tensorboard") or _is_installed("tensorboardX")):
        missing.append("sinks.tensorboard needs the package tensorboard or tensorboardX")
    if missing:
        raise ValueError("; ".join(missing) + ": install it, or leave the sink off")
    sinks: list[Sink] = [ConsoleSink(total_iterations)]
    if config.wandb != "off":
        sinks.append(WandbSink(config.wandb, run_dir))
    if config.tensorboard:
        sinks.append(TensorBoardSink(run_dir))
    return sinks


class ConsoleSink:
    """A progress bar with one line per iteration above it; plain lines without a terminal.

    Args:
        total_iterations: where the bar ends.
        stream: where to write; standard output by default.
    """

    def __init__(self, total_iterations: int, stream: TextIO | None = None) -> None:
        self._total = total_iterations
        self._stream = stream or sys.stdout
        self._console = Console(file=self._stream, highlight=False, markup=False)
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._eval: dict[str, Any] = {}  # the last evaluation, until a line has shown it
        self._done = 0
        self._first = 0  # iterations done when this process began: not 0 in a resumed run
        self._begin_s: float | None = None

    def event(self, event: dict[str, Any]) -> None:
        """Show the event; `step` events only move the clock."""
        kind = event["event"]
        if kind == "run":
            self._line(_run_line(event, self._total))
            self._start_bar()
        elif kind == "resume":
            self._done = event["iteration"]
            self._start_bar()
        elif kind == "eval":
            self._eval = event
        elif kind == "iteration":
            self._iteration(event)
        elif kind == "end":
            self._line(_end_line(event, self._done, self._total, self._eval))
            self.close()

    def close(self) -> None:
        """Remove the bar and restore the cursor."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _iteration(self, event: dict[str, Any]) -> None:
        if self._begin_s is None:
            self._begin_s = event["time_s"] - event.get("time/iteration_s", 0.0)
            self._first = event["iteration"]
        self._done = event["iteration"] + 1
        line = iteration_line(event, self._total, self._eval)
        self._eval = {}
        if self._progress is not None:
            self._line(line)
            self._progress.update(self._task, completed=self._done)
        else:
            mean_s = (event["time_s"] - self._begin_s) / (self._done - self._first)
            self._line(f"{line} | ETA {_clock(mean_s * (self._total - self._done))}")

    def _start_bar(self) -> None:
        if not self._console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("iterations"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            refresh_per_second=2,
        )
        self._task = self._progress.add_task("iterations", total=self._total)
        self._progress.start()

    def _line(self, text: str) -> None:
        if self._progress is not None:
            self._console.print(text, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


class WandbSink:
    """Weights & Biases. Its folder is in the run's; offline mode touches no network.

    Where its server cannot be reached as the run begins, it is as if `offline` had been asked for.

    A run that is resumed goes on as the run that it was: its id is in `wandb_id` of the run's
    folder. Iterations after the last checkpoint, which are done again, are drawn again: what was
    sent is not taken back.

    Args:
        mode: `offline` writes files that `wandb sync` uploads later; `online` uploads.
        run_dir: the run's folder.
    """

    def __init__(self, mode: Literal["offline", "online"], run_dir: Path) -> None:
        import wandb

        self._wandb = wandb
        run_dir.mkdir(parents=True, exist_ok=True)
        kept = run_dir / "wandb_id"
        resumed = kept.exists()
        if not resumed:
            kept.write_text(secrets.token_hex(4), encoding="ascii")
        name = kept.read_text(encoding="ascii")
        try:
            self._run: Any = self._begin(run_dir, mode, name, resumed)
        except wandb.errors.CommError as unreachable:
            print(
                f"Weights & Biases cannot be reached ({unreachable}); what it is told is kept in "
                f"{run_dir / 'wandb'}, and `wandb sync` uploads it later",
                file=sys.stderr,
                flush=True,
            )
            wandb.teardown()  # its service still holds the id
            self._run = self._begin(run_dir, "offline", name, resumed)
        self._run.define_metric("*", step_metric="iteration")
        for names in ("loss/*", "precision/*", "time/step_s"):
            self._run.define_metric(names, step_metric="step")
        self._exit_code = 1  # until the `end` event says that the run completed

    def _begin(
        self, run_dir: Path, mode: Literal["offline", "online"], name: str, resumed: bool
    ) -> Any:
        return self._wandb.init(
            project="megatron-precision",
            name=run_dir.name,
            id=name,
            resume="allow" if resumed else None,
            mode=mode,
            dir=str(run_dir),
            settings=self._wandb.Settings(
                console="off",
                silent=True,
                disable_git=True,
                x_disable_stats=True,
                init_timeout=_REACHED_WITHIN_S,
            ),
        )

    def event(self, event: dict[str, Any]) -> None:
        """Log the numbers; a list becomes a histogram, the run's description the config."""
        if event["event"] == "run":
            self._run.config.update({k: v for k, v in event.items() if k not in _STAMPS})
            return
        logged: dict[str, Any] = {"iteration": event["iteration"], "step": event["step"]}
        for name, value in _metrics_of(event).items():
            if isinstance(value, list):
                bars = _finite_numbers(value)
                if bars:
                    logged[name] = self._wandb.Histogram(bars)
            elif value != "":
                logged[name] = value
        self._run.log(logged)
        if event["event"] == "end":
            self._exit_code = 0 if event.get("status") == "completed" else 1
            self._run.summary["status"] = event.get("status", "")

    def close(self) -> None:
        """Finish the run and end wandb's own process."""
        if self._run is not None:
            self._run.finish(exit_code=self._exit_code)
            self._run = None
            self._wandb.teardown()


class TensorBoardSink:
    """TensorBoard event files in `tensorboard/` of the run's folder."""

    def __init__(self, run_dir: Path) -> None:
        if _is_installed("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        else:
            from tensorboardX import SummaryWriter  # type: ignore[import-not-found]
        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def event(self, event: dict[str, Any]) -> None:
        """Add the numbers as scalars, lists as histograms, descriptions as text."""
        for name, value in _metrics_of(event).items():
            at = event["step"] if _is_by_step(name) else event["iteration"]
            if isinstance(value, list):
                bars = _finite_numbers(value)
                if bars:
                    self._writer.add_histogram(name, _as_array(bars), at)
            elif isinstance(value, str):
                if value:
                    self._writer.add_text(name, value, at)
            else:
                self._writer.add_scalar(name, value, at)
        if event["event"] in ("run", "end"):
            plain = {k: v for k, v in event.items() if k not in _STAMPS and "/" not in k}
            text = json.dumps(plain, indent=2, sort_keys=True)
            self._writer.add_text(event["event"], f"```\n{text}\n```", event["iteration"])
        if event["event"] != "step":
            self._writer.flush()

    def close(self) -> None:
        """Write out what is buffered and close the file."""
        self._writer.close()


_STAMPS = ("event", "time_s", "iteration", "step")


def iteration_line(event: dict[str, Any], total: int, evaluation: dict[str, Any]) -> str:
    """Format the console's line of an iteration.

    Args:
        event: the `iteration` event.
        total: iterations of the whole run.
        evaluation: the last `eval` event where no line has shown it yet, else {}.
    """
    width = len(str(total))
    parts = [
        f"{event['iteration'] + 1:>{width}}/{total}",
        f"reward {_number(event.get('reward/mean'), '.3f')}",
    ]
    parts += _eval_parts(evaluation)
    parts += [
        f"k3 {_number(event.get('mismatch/k3_kl'), '.2e')}",
        f"scale {_scale(event.get('precision/loss_scale'))}",
        f"skips {_number(event.get('precision/skipped_total'), '.0f')}",
        f"{_number(event.get('throughput/tokens_per_s'), ',.0f')} tokens/s",
        f"{_number(event.get('time/iteration_s'), '.1f')} s",
    ]
    return " | ".join(parts)


def _run_line(event: dict[str, Any], total: int) -> str:
    config = event.get("config", {})
    algo = config.get("algo", {}).get("name", "?")
    return (
        f"{config.get('recipe', '?')} | {config.get('precision', '?')} | {algo} | "
        f"seed {config.get('seed', '?')} | {total} iterations | "
        f"{event.get('rank_count', '?')} ranks | run {event.get('fingerprint', '?')} | "
        f"start {event.get('start_fingerprint', '?')}"
    )


def _eval_parts(evaluation: dict[str, Any]) -> list[str]:
    """Format `eval@10 0.613`: the accuracy after ten iterations."""
    if "eval/accuracy" not in evaluation:
        return []
    return [f"eval@{evaluation['iteration']} {_number(evaluation['eval/accuracy'], '.3f')}"]


def _end_line(event: dict[str, Any], done: int, total: int, evaluation: dict[str, Any]) -> str:
    parts = [f"{event.get('status', '?')} after {done}/{total} iterations"]
    parts += _eval_parts(evaluation)
    parts.append(f"{_clock(event.get('time/total_s', event['time_s']))} in all")
    if event.get("error"):
        parts.append(str(event["error"]))
    return " | ".join(parts)


def _metrics_of(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if "/" in name}


def _is_by_step(name: str) -> bool:
    return name.startswith(("loss/", "precision/")) or name == "time/step_s"


def _finite_numbers(values: list[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _as_array(values: list[float]) -> Any:
    import numpy as np

    return np.asarray(values, dtype=np.float64)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _scale(value: float | None) -> str:
    return "-" if value is None else power_of_two(value)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def power_of_two(value: float) -> str:
    """Format a loss scale: `2^20` if it is a power of two above one, else the number."""
    if value > 1 and math.isfinite(value) and math.log2(value).is_integer():
        return f"2^{int(math.log2(value))}"
    return f"{value:g}"
