"""render: one HTML file that needs nothing else, and works without JavaScript."""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("pear_megatron.pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, **context: Any) -> str:
    """The page that a file of ``templates/`` makes of ``context``; every text in it is escaped."""
    return _environment().get_template(template).render(context)
