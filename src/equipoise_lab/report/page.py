"""The self-contained page ``report.html``, from records, figures and findings.

The page depends only on the records, so the same records give the same bytes. It contains plotly and the data in
compressed form; the browser decompresses them. Without JavaScript it shows the tables and still pictures.
"""

import json
import os
import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis.figures import CAP
from equipoise_lab.analysis.summary import COLUMNS, number
from equipoise_lab.analysis.tables import Records, read_records
from equipoise_lab.report.browser_data import pack
from equipoise_lab.report.contents import abbreviate, of_audit, of_runs

__all__ = ["Live", "write_page", "write_report"]

TEMPLATES = ("page.html.jinja", "runs.html.jinja", "audit.html.jinja")
SCRIPTS = ("start", "figures", "experts", "time", "tables", "files", "controls")  # in this order


class Live(NamedTuple):
    """What a live page says of itself."""

    seconds: int  # until it is written again
    time: str
    progress: str


def write_report(folder: str | Path, say: Callable[[str], None] | None = None) -> Path:
    """Writes ``report.html`` into ``folder``, from the runs below it or from the audit in it. Returns the path.

    The page is self-contained and needs no network. It names damaged and unfinished runs and draws what they allow.
    ``say`` gets a line for each of them.
    Raises ``EquipoiseError`` and writes nothing if no run has a step. An old page is replaced atomically.
    """
    records = read_records(folder)
    page = write_page(Path(folder), records)
    if say is not None:
        for problem in records.problems:
            say(f"{problem.name}: {'' if problem.kind == 'unfinished' else f'{problem.kind}, '}{problem.reason}")
    return page


def write_page(folder: Path, records: Records, live: Live | None = None) -> Path:
    """As ``write_report``, of these records."""
    if records.recorded_runs:
        if not any(run.steps or run.evaluation for run in records.recorded_runs):
            reasons = "; ".join(f"{p.name}: {p.reason}" for p in records.problems) or "runs without a step"
            raise EquipoiseError(
                f"A report needs at least one run with a step: {folder} contains {reasons}. Write the report again "
                "after the first step of a run."
            )
        template, values = "runs.html.jinja", of_runs(records, live.seconds if live else None)
    else:
        if len(records.audits) > 1:
            raise EquipoiseError(
                f"A report shows one audit: {folder} contains {', '.join(records.audits)}. Pass the folder of one of "
                "them."
            )
        template, values = "audit.html.jinja", of_audit(records)
    text = _environment().get_template(template).render(problems=records.problems, live=live, **values)
    return _replace(folder / "report.html", text)


@cache
def _environment() -> Environment:
    loader = DictLoader({name: _read_file(f"templates/{name}") for name in TEMPLATES})
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(
        plotly=Markup(pack(get_plotlyjs())),
        style=Markup(_read_file("templates/page.css")),
        script=Markup("\n".join(_read_file(f"scripts/{name}.js") for name in SCRIPTS)),
        columns=COLUMNS,
        cap=CAP,
        abbreviate=abbreviate,
        number=number,
        breakable=breakable,
        pretty=lambda value: json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True),
    )
    return environment


def _read_file(name: str) -> str:
    return files("equipoise_lab.report").joinpath(name).read_text(encoding="utf-8")


def _replace(path: Path, text: str) -> Path:
    """Atomically. Two processes may write the same page, for example a training and ``report --live``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", newline="\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def breakable(name: str) -> Markup:
    """A strategy's name that may wrap after its separators, but not within a word."""
    return Markup("<wbr>").join(re.findall(r"[^:,+/]*[:,+/]?", name)[:-1])
