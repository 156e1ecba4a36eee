"""Put two of a report's figures into one picture for the README.

.venv/bin/python benchmarks/readme_picture.py runs/sanity-dense docs/images/sanity.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image


def main() -> None:
    folder, out = Path(sys.argv[1], "report_files"), Path(sys.argv[2])
    parts = [Image.open(folder / f"{n}.png") for n in ("mismatch", "sequence_log_ratios")]
    width = max(part.width for part in parts)
    scaled = [
        p.resize((width, p.height * width // p.width), Image.Resampling.LANCZOS) for p in parts
    ]
    picture = Image.new("RGB", (width, sum(p.height for p in scaled)), "white")
    top = 0
    for part in scaled:
        picture.paste(part, (0, top))
        top += part.height
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.resize((width // 2, top // 2), Image.Resampling.LANCZOS).save(out, optimize=True)


if __name__ == "__main__":
    main()
