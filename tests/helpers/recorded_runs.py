"""Recorded runs and audits that a test makes, and what their page says."""

import json
import math
import re

from equipoise_lab.records import Run, find_runs
from equipoise_lab.report.browser_data import unpack

EVEN = {"prose": [[5, 5, 5, 5], [10, 10, 10, 10]], "code": [[5, 5, 5, 5], [10, 10, 10, 10]]}


SPLIT = {"prose": [[10, 10, 0, 0], [6, 0, 2, 0]], "code": [[0, 0, 10, 10], [0, 3, 0, 1]]}


def make_run(
    path,
    strategy="none",
    seed=0,
    *,
    nats=2.0,
    maxvio=0.5,
    bits=0.25,
    load=EVEN,
    steps=20,
    last=None,
    finish=True,
    **config,
):
    settings = {
        "strategy": strategy,
        "seed": seed,
        "arch": "glm4_moe",
        "steps": steps,
        "num_parameters": 13_107_200,
        "num_active_parameters": 3_300_000,
        "num_experts": 4,
        "experts_per_token": 2,
        "layers": ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"],
        "domains": list(load),
        "sequence_length": 128,
        "sequences_per_micro_batch": 8,
        "micro_batches_per_step": 8,
        "learning_rate": 3e-3,
        "data": "corpus",
        "shuffled": False,
        "score_function": "sigmoid",
        "command": "equipoise compare --out runs",
        "versions": {"equipoise": "0.1.0"},
        "notes": [],
        **config,
    }
    run = Run.create(path, settings)
    for step in range(1, (last or steps) + 1):
        run.append("steps", {"step": step, "loss": 4.0 / step, "maxvio_batch": 1.0 / step, "bias_max": step / 100})
        run.append("loads", {"step": step, "load": [[step, 1, 1, 0], [2, 2, 2, 2]]})
    figures = {
        "val_nats": nats,
        "val_perplexity": math.exp(nats),
        "val_bits_per_byte": nats / 2,
        "maxvio_global": maxvio,
        "maxvio_floor": 0.021,
        "domain_information_bits": bits,
        "dead_experts": 3,
    }
    domains = {name: {"nats": nats + i, "bits_per_byte": 1.0} for i, name in enumerate(load)}
    rows = {name: {**domains[name], "tokens": 10, "load": load[name]} for name in load}
    run.append("evaluations", {"step": last or steps, **figures, "domains": rows})
    if finish:
        run.finish(
            {
                "strategy": strategy,
                "seed": seed,
                **figures,
                "maxvio_batch": 0.75,
                "tokens_per_second": 1234.0,
                "domains": domains,
            }
        )
    return run


def make_audit(load):
    """An audit as `equipoise audit` writes it."""
    domains = list(load)
    layers = []
    for index in range(2):
        by_domain = [list(load[domain][index]) for domain in domains]
        pooled = [sum(column) for column in zip(*by_domain, strict=True)]
        measured = {"value": 0.5, "bound": 0.01}
        layers.append(
            {
                "layer": f"model.layers.{index + 1}.mlp.gate",
                "experts": 4,
                "k": 1,
                "load": pooled,
                "load_by_domain": by_domain,
                "maxvio": max(pooled) / (sum(pooled) / 4) - 1,
                "maxvio_floor": 0.02,
                "dead_experts": 0,
                "starved_experts": 0,
                "effective_experts": 3.5,
                "domain_information_bits": {**measured, "share": 0.5},
                "domain_distance": measured,
                "topk_score_sum": 0.5,
                "router_entropy": 0.5,
                "partners": [[[1, 0.5]], [[0, 0.5]], [], []],
                "information_by_level": {"script": measured, "domain": measured},
                "rank_load": {"2": 1.0},
                "typical_tokens": [[{"text": "the", "share": 0.75, "count": 9}], [], [], []],
            }
        )
    mean = {
        "information_by_level": {"script": 0.4, "domain": 0.1},
        "maxvio": 0.5,
        "maxvio_floor": 0.02,
        "domain_information_bits": 0.5,
        "domain_distance": 0.5,
    }
    return {
        "format": 1,
        "model": "some/model",
        "model_type": "olmoe",
        "num_parameters": 1000,
        "data": "corpus",
        "domains": domains,
        "tokens": dict.fromkeys(domains, 20),
        "nats": {domain: 2.0 + i for i, domain in enumerate(domains)},
        "notes": [],
        "words": [],
        "layers": layers,
        "mean": mean | {"topk_score_sum": 0.5, "router_entropy": 0.5},
    }


def runs_of(folder, **by_strategy):
    """Runs with these losses by strategy, one per seed."""
    for strategy, nats in by_strategy.items():
        for seed, value in enumerate(nats):
            make_run(folder / f"{strategy}{seed}", strategy, seed, nats=value, maxvio=0.1 * len(strategy))
    return find_runs(folder)


def own_text(path):
    """The page without plotly, the data and the still pictures."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r'<script id="(data|plotly)"[^>]*>[^<]*</script>', "", text)
    return re.sub(r'<noscript><img src="data:image/png;base64,[^"]*" alt="[^"]*" class="still"></noscript>', "", text)


def data_of(path):
    """The data from which the page's scripts draw."""
    packed = re.search(r'<script id="data"[^>]*>([^<]*)</script>', path.read_text(encoding="utf-8")).group(1)
    return json.loads(unpack(packed))


def cells(text, heading):
    """The cells of the table below a heading, row by row."""
    section = text[text.index(f'id="{heading}"') :]
    body = re.search(r"<tbody>(.*?)</tbody>", section, re.S).group(1)
    strip = lambda cell: re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", cell)).strip()  # noqa: E731
    return [[strip(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in body.split("</tr>")[:-1]]


def sentences_of(findings):
    return [
        re.sub(r"\s+", " ", re.sub("<[^>]*>", "", s)).replace("&nbsp;", " ")
        for s in (findings.headline, *findings.details)
    ]
