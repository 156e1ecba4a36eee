"""`python dry_runs.py`: several command lines of `launch.py` in one process, which imports nemo-run
once. Reads a JSON object of command lines from standard input; writes what each said and returned.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys

from megatron_precision.cli import launch


def main() -> None:
    said = {}
    for name, argv in json.load(sys.stdin).items():
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = launch.main(argv)
        said[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
