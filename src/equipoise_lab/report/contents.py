"""What a page shows: the values of its template, from the records. ``of_runs`` and ``of_audit``."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from equipoise_lab.analysis import figures
from equipoise_lab.analysis.figures import CAP, layer_labels
from equipoise_lab.analysis.reader import RecordedRun
from equipoise_lab.analysis.styles import strategy_styles
from equipoise_lab.analysis.summary import mean_and_sd, number, summary_rows, unequal_terms
from equipoise_lab.analysis.tables import Records
from equipoise_lab.records import Config
from equipoise_lab.report.browser_data import figure_data, loads_over_time, model_data, packed, table_data
from equipoise_lab.report.experts_table import experts_table
from equipoise_lab.report.findings import compare_runs
from equipoise_lab.report.stills import still

__all__ = ["abbreviate", "of_audit", "of_runs"]

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d")  # how a time in a record begins


def of_runs(records: Records, live: int | None = None) -> dict[str, Any]:
    """``live``: seconds until the page loads itself again. Such a page has no stills, which would take most of its time
    from the training beside it.
    """
    recorded_runs = records.recorded_runs
    strategies = list(dict.fromkeys(run.strategy for run in recorded_runs))
    run_files = [run.files for run in recorded_runs]
    table = records.runs()
    curves = _curves(records)
    timed_runs = [run for run in _one_run_per_strategy(recorded_runs) if run.steps]
    drawn_runs = _one_run_per_strategy(recorded_runs, evaluated=True)
    models = [model for run in drawn_runs if (model := run.experts) is not None]
    drawn = Records(tuple(drawn_runs), {}, ())
    experts = drawn.experts()
    times = loads_over_time(timed_runs)
    have_loads = {(time["strategy"], time["seed"]) for time in times}  # one that was killed or copied may have none
    timed_runs = [run for run in timed_runs if (run.strategy, run.seed) in have_loads]
    maps = [model_data(model, len(models), run) for model, run in zip(models, drawn_runs, strict=True)]
    steps = sorted({one["step"] for model in maps for one in model["maps"]})
    rank_loads = figures.rank_loads(experts)
    costs = rank_loads.to_pylist()
    rows = summary_rows(run_files)
    pictures = dict(curves)
    if len(strategies) > 1 and any(run.result is not None for run in recorded_runs):
        pictures["outcome"] = figures.quality_against_balance(table)
    if costs:
        pictures["cost"] = figures.cost(rank_loads)
    stills = {f"plot-{name}": figure for name, figure in pictures.items()}
    stills |= {f"heat-{i}": figures.expert_map(experts, run=model.name) for i, model in enumerate(models)}
    if times:
        stills["plot-time"] = figures.load_over_time(Records((timed_runs[-1],), {}, ()).loads(120))
    return {
        "data": packed(
            cap=int(CAP),
            figures={name: figure_data(figure) for name, figure in pictures.items()},
            models=maps,
            steps=steps,
            times=times,
            strategies=strategies,
            subtitle=_subtitle(_config_of(recorded_runs)),
            seeds=_seeds(recorded_runs),
            table=table_data(table.drop_columns(["config"]).to_pylist()),
            live=live,
        ),
        **_facts(recorded_runs),
        "steps": steps,
        "stills": {} if live else {name: still(figure) for name, figure in stills.items()},
        "sections": _sections_of_runs(bool(rows), bool(costs)),
        "strategies": strategies,
        "styles": strategy_styles(strategies),
        "findings": compare_runs(run_files),
        "is_paired": "outcome" in pictures and pictures["outcome"].layout.meta["paired"],
        "figure_names": list(pictures),
        "window": curves["loss"].layout.meta["window"],
        "rows": rows,
        "drawn_runs": drawn_runs,
        "timed_runs": timed_runs,
        "experts_shown": experts_table(models[-1], maps[-1]) if models else None,
        "has_tokens": any(any(layer) for model in models for layer in model.typical),
        "costs": _costs_by_strategy(costs),
    }


def _facts(recorded_runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """What the texts and tables of the page say of the runs, beside their results."""
    config = _config_of(recorded_runs)
    return {
        "recorded_runs": recorded_runs,
        "config": config,
        "trained": _dates(run.config.get("began") for run in recorded_runs),
        "num_seeds": len({run.seed for run in recorded_runs}),
        "differing_settings": unequal_terms([run.config for run in recorded_runs]),
        "notes": _seeds_by_note(recorded_runs),
        "domain_rows": _domain_rows(recorded_runs),
        "domains": config["domains"],
        "layers": layer_labels(config["layers"]),
    }


def _config_of(recorded_runs: Sequence[RecordedRun]) -> dict[str, Any]:
    return dict.fromkeys(Config.__annotations__) | recorded_runs[0].config  # a page shows None as "?"


def of_audit(records: Records) -> dict[str, Any]:
    [(name, audit)] = records.audits.items()
    [model] = records.models
    experts, layers = records.experts(), audit["layers"]
    pictures = {"layers": figures.layers(layers)}
    rank_loads = figures.rank_loads(experts)
    costs = rank_loads.to_pylist()
    if costs:
        pictures["cost"] = figures.cost(rank_loads)
    drawn = model_data(model, 1)
    levels = audit["mean"].get("information_by_level", {})
    stills = {f"plot-{key}": figure for key, figure in pictures.items()} | {"heat-0": figures.expert_map(experts)}
    return {
        "data": packed(
            cap=int(CAP),
            figures={key: figure_data(figure) for key, figure in pictures.items()},
            models=[drawn],
            steps=[],
            times=[],
            strategies=[model.strategy],
            subtitle="",
            seeds="",
            table=table_data([_single_numbers(layer) for layer in layers]),
            live=None,
        ),
        "steps": [],
        "stills": {key: still(figure) for key, figure in stills.items()},
        "sections": [
            ("h-summary", "Summary"),
            *([("h-levels", "Information by level")] if len(levels) > 1 else []),
            ("h-heat", "Experts by domain"),
            ("h-layers", "Layer by layer"),
            *([("h-cost", "Cost")] if costs else []),
            ("h-domains", "Text"),
            *([("h-config", "Reproduce")] if audit.get("command") else []),
        ],
        "name": name,
        "audit": audit,
        "audited": _dates([audit.get("began")]),
        "styles": strategy_styles([model.strategy]),
        "layers": layer_labels(model.layers),
        "model": model,
        "domains": model.domains,
        "num_tokens": sum(audit["tokens"].values()),
        "experts_shown": experts_table(model, drawn),
        "has_tokens": any(any(layer) for layer in model.typical),
        "costs": _costs_by_strategy(costs),
    }


def _curves(records: Records) -> dict[str, go.Figure]:
    steps = records.steps()
    curves = {
        "loss": figures.curve(steps, "loss", title="Training loss, nats per token"),
        "maxvio": figures.curve(steps, "maxvio_batch", title="MaxVio of each training step (log scale)", log=True),
    }
    if "bias_max" in steps.column_names:
        curves["bias"] = figures.curve(steps, "bias_max", title="Largest expert bias, absolute value")
        if not curves["bias"].data:
            del curves["bias"]
    unfinished = {run.name for run in records.recorded_runs if run.result is None}
    for figure in curves.values():
        for trace in figure.data:
            trace.name += " (not finished)" if trace.meta["run"] in unfinished else ""
    return curves


def _sections_of_runs(has_results: bool, has_costs: bool) -> list[tuple[str, str]]:
    """The contents. Before a run is finished, its training is what there is to see, so it comes first."""
    training, heat = ("h-curves", "During training"), ("h-heat", "Experts by domain")
    first = [("h-outcome", "Summary"), heat] if has_results else [training, heat]
    return [
        *first,
        ("h-table", "Results"),
        *([training] if has_results else []),
        *([("h-cost", "Cost")] if has_costs else []),
        ("h-domains", "Loss by domain"),
        ("h-config", "Reproduce"),
    ]


def _subtitle(config: Mapping[str, Any]) -> str:
    """What a picture that stands alone says about the model and its training."""
    num_layers = len(config["layers"])
    parts = [
        f"{config['arch'] or 'model'} of {abbreviate(config['num_parameters'])} parameters",
        f"{num_layers} MoE layer{'s' if num_layers > 1 else ''} of {config['num_experts']} experts, "
        f"{config['experts_per_token'] or '?'} per token",
        f"{config['steps']} steps on {config['data'] or '?'}",
    ]
    return " · ".join(parts)


def _seeds(recorded_runs: Sequence[RecordedRun]) -> str:
    seeds = sorted({run.seed for run in recorded_runs})
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _dates(times: Iterable[Any]) -> str | None:
    """The first and the last of some times, in UTC. None if none is known: records from elsewhere may have any text."""
    began = sorted(match.group() for time in times if (match := TIME.match(str(time))) is not None)
    if not began:
        return None
    (first_day, first), (last_day, last) = (time.split("T") for time in (began[0], began[-1]))
    if began[0] == began[-1]:
        return f"{first_day}, {first} UTC"
    return f"{first_day}, {first} to {last} UTC" if first_day == last_day else f"{first_day} to {last_day}"


def _single_numbers(layer: dict[str, Any]) -> dict[str, Any]:
    """The entries of an audited layer that fit into one cell of a table."""
    numbers = {key: value for key, value in layer.items() if isinstance(value, int | float | str)}
    for key in ("domain_information_bits", "domain_distance"):
        numbers |= {key: layer[key]["value"], f"{key}_bound": layer[key]["bound"]}
    return numbers


def _costs_by_strategy(costs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The table of costs: ``sizes`` (numbers of ranks), and by strategy and size (mean over layers, worst layer)."""
    sizes = sorted({row["ranks"] for row in costs})
    rows: dict[str, dict[int, tuple[float, float]]] = {}
    for row in costs:
        rows.setdefault(row["strategy"], {})[row["ranks"]] = (row["mean"], row["worst"])
    return {"sizes": sizes, "rows": rows}


def abbreviate(value: Any) -> str:
    """A large number in three digits: 13,107,200 is ``13.1 M``. "?" if it is not a number."""
    if not isinstance(value, int | float):
        return "?"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * size:  # three digits round it up to this unit
            return f"{value / size:.3g} {unit}"
    return str(value)


def _seeds_by_note(recorded_runs: Sequence[RecordedRun]) -> dict[tuple[str, str], list[int]]:
    """The seeds that have a note or an alert, by strategy and text."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for run in recorded_runs:
        alerts = [f"step {row['step']}: {alert}" for row in run.steps for alert in row.get("alerts") or []]
        for note in [*run.config.get("notes", []), *alerts]:
            seeds.setdefault((run.strategy, str(note)), []).append(run.seed)
    return seeds


def _one_run_per_strategy(recorded_runs: Sequence[RecordedRun], *, evaluated: bool = False) -> list[RecordedRun]:
    """The runs from which experts are drawn: finished ones first, then the lowest seed. ``evaluated``: of those with an
    evaluation.

    Experts of different seeds do not correspond, so they are never averaged.
    """
    by_strategy: dict[str, RecordedRun] = {}
    for run in sorted(recorded_runs, key=lambda run: (run.result is None, run.seed)):
        if run.evaluation is not None or not evaluated:
            by_strategy.setdefault(run.strategy, run)
    order = list(dict.fromkeys(run.strategy for run in recorded_runs))
    return sorted(by_strategy.values(), key=lambda run: order.index(run.strategy))


def _domain_rows(recorded_runs: Sequence[RecordedRun]) -> list[dict[str, Any]]:
    """The table of losses by domain, one row per strategy."""
    losses: dict[str, list[dict[str, Any]]] = {}  # by strategy: one {domain: losses} per seed
    for run in recorded_runs:
        if run.result is not None:
            losses.setdefault(run.strategy, []).append(run.result["domains"])
    rows = []
    for strategy, by_seed in losses.items():
        cells = {}
        for domain in dict.fromkeys(domain for by_domain in by_seed for domain in by_domain):
            mean, sd = mean_and_sd([by_domain.get(domain, {}).get("nats") for by_domain in by_seed])
            cells[domain] = number(mean, 3) + ("" if sd is None else f" ± {number(sd, 3)}")
        rows.append({"strategy": strategy, "cells": cells})
    return rows
