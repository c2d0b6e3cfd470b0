"""Renders the package's Jinja2 templates. Autoescape escapes every value that a template prints.

Only the plots of plots.py are Markup, which passes as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stillhouse.reporting.text_formats import format_number, format_percent
from storage.backends.disk import format_bytes

_PACKAGE_FOLDER = Path(__file__).parent.parent


def render_template(name: str, **values: Any) -> str:
    """The text of the template at `name`, a path below the package's folder, filled with `values`.

    jinja2.UndefinedError for a name in the template that `values` lacks.
    """
    environment = Environment(
        loader=FileSystemLoader(_PACKAGE_FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"as_bytes": format_bytes, "as_percent": format_percent, "as_number": format_number}
    return environment.get_template(name).render(values)
