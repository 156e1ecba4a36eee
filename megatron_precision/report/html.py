"""Writes self-contained HTML pages: reports extend `base.html.j2` and share `report.css`."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

_HERE = Path(__file__).parent


def write_page(out: Path, template: Path, **values: Any) -> None:
    """Render a template and write the page, with the stylesheet inside it.

    Args:
        out: the HTML file.
        template: a template that extends `base.html.j2`.
        values: the template's variables; one that is missing raises `jinja2.UndefinedError`.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    css = (_HERE / "report.css").read_text(encoding="utf-8")
    page = environment.get_template(template.name).render(css=css, **values)
    out.write_text(page, encoding="utf-8")


def save_image(figure: Figure, path: Path, dpi: float) -> str:
    """Write a figure as a PNG file, and return it as a `data:` URL for a page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    path.write_bytes(buffer.getvalue())
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
