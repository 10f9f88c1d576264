"""Records -> one HTML file that needs nothing else: no script, no request, the same bytes for the same data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..trained import command_of
from .comparison import comparison_page
from .pruned import model_page
from .records import Records
from .shrunk import shrunk_page
from .trained import trained_page
from .wording import tidy

PAGES = {"shrink": shrunk_page, "finetune": trained_page}
BEGINNING = b"<!DOCTYPE html>"


def is_page(path: Path) -> bool:
    """Whether a file is empty or may be a page that `render_page` made, and so be replaced by another."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(BEGINNING)) in (b"", BEGINNING)


def render_page(records: Records) -> str:
    """Make a page of recorded data.

    Args:
        records: what `load_records` read.

    Returns:
        An HTML document; a pure function of the records.
    """
    records = replace(
        records,
        name=tidy(records.name),
        report=tidy(records.report),
        evaluations=tidy(records.evaluations),
        comparisons=tidy(records.comparisons),
    )
    if records.kind == "comparison":
        page = comparison_page(records)
    else:
        page = PAGES.get(command_of(records.report), model_page)(records)
    sections = [section for section in page.sections if not section.empty]
    environment = Environment(
        loader=PackageLoader("secateur", "reporting/page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.jinja").render(page=page, sections=sections)
