import base64
import csv
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis import figures
from equipoise_lab.analysis.summary import COLUMNS, summary_rows, unequal_terms
from equipoise_lab.analysis.tables import read_records
from equipoise_lab.records import Run, find_runs, write_json
from equipoise_lab.report import write_report
from equipoise_lab.report.findings import compare_runs
from equipoise_lab.report.page import abbreviate, unpack

EVEN = {"prose": [[5, 5, 5, 5], [10, 10, 10, 10]], "code": [[5, 5, 5, 5], [10, 10, 10, 10]]}
SPLIT = {"prose": [[10, 10, 0, 0], [6, 0, 2, 0]], "code": [[0, 0, 10, 10], [0, 3, 0, 1]]}
CHROMIUM = Path("/usr/bin/chromium")


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


def own_text(path):
    """The page without plotly and the data."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r'<script id="(data|plotly)"[^>]*>[^<]*</script>', "", text)


def data_of(path):
    """The data from which page.js draws."""
    packed = re.search(r'<script id="data"[^>]*>([^<]*)</script>', path.read_text(encoding="utf-8")).group(1)
    return json.loads(unpack(packed))


def sentences_of(findings):
    return [
        re.sub(r"\s+", " ", re.sub("<[^>]*>", "", s)).replace("&nbsp;", " ")
        for s in (findings.headline, *findings.details)
    ]


def cells(text, heading):
    """The cells of the table below a heading, row by row."""
    section = text[text.index(f'id="{heading}"') :]
    body = re.search(r"<tbody>(.*?)</tbody>", section, re.S).group(1)
    strip = lambda cell: re.sub(r"\s+", " ", re.sub(r"<[^>]*>", "", cell)).strip()  # noqa: E731
    return [[strip(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in body.split("</tr>")[:-1]]


def test_page_shows_the_known_numbers_in_its_tables(tmp_path):
    make_run(tmp_path / "a", "none", nats=2.0, maxvio=0.5)
    make_run(tmp_path / "b", "lbl", nats=2.1, maxvio=0.1)
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    text = own_text(path)
    assert cells(text, "h-table") == [
        ["none", "2.000", "7.39", "1.000", "0.500", "0.021", "0.750", "0.250", "3", "1,234"],
        ["lbl", "2.100", "8.17", "1.050", "0.100", "0.021", "0.750", "0.250", "3", "1,234"],
    ]
    assert cells(text, "h-domains") == [["none", "2.000", "3.000"], ["lbl", "2.100", "3.100"]]
    assert all(column.definition.split(".")[0][:20] in text.replace("&#39;", "'") for column in COLUMNS)
    assert list(tmp_path.glob(".*")) == []  # no temporary file is left


def test_summary_rows_are_mean_and_standard_deviation_over_seeds(tmp_path):
    for seed, nats in enumerate([2.0, 2.2, 2.4]):
        make_run(tmp_path / f"a{seed}", "none", seed, nats=nats)
    make_run(tmp_path / "b", "lbl", 0)
    make_run(tmp_path / "c", "lbl", 1, finish=False)
    none, lbl = summary_rows(find_runs(tmp_path))
    assert none["strategy"] == "none" and none["seeds"] == [0, 1, 2]
    assert none["val_nats"] == pytest.approx(2.2) and none["val_nats_sd"] == pytest.approx(0.2)
    assert none["val_perplexity"] == pytest.approx(statistics.fmean(math.exp(x) for x in (2.0, 2.2, 2.4)))
    assert lbl["seeds"] == [0] and lbl["val_nats_sd"] is None
    assert COLUMNS[0].text(none) == "2.200 ± 0.200" and COLUMNS[0].text(lbl) == "2.000"
    text = own_text(write_report(tmp_path))
    assert cells(text, "h-table")[0][:3] == ["none", "3", "2.200 ± 0.200"]


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


def test_a_consistent_lead_wins_and_shows_its_interval(tmp_path):
    findings = compare_runs(runs_of(tmp_path, best=[2.0, 3.0, 2.5], worse=[2.1, 3.12, 2.59]))
    headline, quality, *_ = sentences_of(findings)
    assert headline.startswith("best won: its loss is significantly lower than with worse.")
    assert "Its load is also the most even." in headline
    # 0.10, 0.12, 0.09: mean 0.10333, sd 0.015275, t(2) 4.3027, so 0.0654 to 0.1413; exp(0.10333) is 10.9 % more
    assert (
        "Next is worse: 0.103 nats higher, 10.9 % in perplexity (95 % interval of the difference: 0.065 to 0.141"
        in quality
    )
    [comparison] = findings.comparisons
    assert comparison.strategy == "worse" and comparison.verdict == "significant"
    assert comparison.nats.estimate.mean == pytest.approx(0.31 / 3)


def test_a_lead_within_the_noise_does_not_win_and_names_the_seeds_needed(tmp_path):
    findings = compare_runs(runs_of(tmp_path, best=[2.0, 3.0, 2.5], other=[2.3, 2.9, 2.6]))
    headline, quality, *_ = sentences_of(findings)
    assert headline.startswith("No strategy won: best has the lowest loss, but its lead may be chance.")
    assert re.search(r"Confirming a difference of this size would take about \d+ seeds\.", quality)
    assert findings.comparisons[0].verdict == "undecided"


def test_the_seeds_needed_account_for_the_family(tmp_path):
    """The lead over the next is half its standard deviation. With five comparisons this takes 51 seeds (tables for 1 %,
    two-sided); with a single comparison it would take 34 (5 %)."""
    far = {f"far{number}": [4.0, 4.1, 4.2] for number in range(4)}
    findings = compare_runs(runs_of(tmp_path, best=[2.0, 2.0, 2.0], next=[1.9, 2.1, 2.3], **far))
    assert len(findings.comparisons) == 5
    assert "Confirming a difference of this size would take about 51 seeds." in sentences_of(findings)[1]


def test_the_headline_separates_beaten_from_unbeaten_strategies(tmp_path):
    findings = compare_runs(runs_of(tmp_path, b=[2.0, 3.0, 2.5], far=[3.0, 4.0, 3.51], near=[2.1, 2.97, 2.6]))
    assert (
        "b has the lowest loss. It is significantly lower than with far; the lead over near may be chance."
        in sentences_of(findings)[0]
    )


def test_significance_is_adjusted_for_the_family(tmp_path):
    """A comparison that is significant alone is not significant together with two others that are not."""
    alone = compare_runs(runs_of(tmp_path / "a", b=[2.0, 2.0, 2.0], one=[2.1, 2.2, 2.3]))
    assert alone.comparisons[0].nats.p == pytest.approx(0.0742, abs=1e-4)
    pair = dict(b=[2.0, 2.0, 2.0], one=[2.15, 2.2, 2.28])
    assert compare_runs(runs_of(tmp_path / "b", **pair)).comparisons[0].is_beaten
    family = compare_runs(runs_of(tmp_path / "c", **pair, x=[1.9, 2.8, 2.0], y=[1.8, 2.9, 2.1]))
    assert not next(comparison for comparison in family.comparisons if comparison.strategy == "one").is_beaten


def test_one_seed_decides_nothing(tmp_path):
    findings = compare_runs(runs_of(tmp_path, best=[2.0], worse=[4.0]))
    headline, quality, *_ = sentences_of(findings)
    assert "best has the lowest loss, but one seed decides nothing about quality." in headline
    assert (
        "This is one seed. Run at least three (--seeds 3)" in quality
        and findings.comparisons[0].verdict == "one seed: undecided"
    )


def test_only_shared_seeds_are_compared(tmp_path):
    """Over all its seeds, a has the lower mean. Over the shared seeds, b has."""
    findings = compare_runs(runs_of(tmp_path, a=[2.0, 3.0, 0.1], b=[1.9, 2.8]))
    assert findings.best == "b" and findings.comparisons[0].nats.estimate.n == 2
    assert "The comparison uses the seeds that all share: 0, 1." in sentences_of(findings)[1]


def test_a_strategy_without_a_common_seed_is_left_out_and_named(tmp_path):
    runs_of(tmp_path, b=[2.0, 3.0, 2.5], one=[3.0, 4.0, 3.5], two=[3.1, 4.1, 3.61])
    make_run(tmp_path / "apart", "apart", nats=0.1, seed=9)
    findings = compare_runs(find_runs(tmp_path))
    headline, left_out, *_ = sentences_of(findings)
    assert headline.startswith("b won: its loss is significantly lower than with one and two.")
    assert left_out == "Left out of the comparison: apart. No seed is shared with the others."
    assert {comparison.strategy for comparison in findings.comparisons} == {"one", "two"}


def test_without_a_seed_of_all_strategies_the_most_frequent_one_decides(tmp_path):
    """a and b share seed 1, b and c share seed 2. The lower of these equally frequent seeds decides."""
    for name, seed, nats in (("a", 0, 3.0), ("a", 1, 3.0), ("b", 1, 2.9), ("b", 2, 3.4), ("c", 2, 3.2)):
        make_run(tmp_path / f"{name}{seed}", name, nats=nats, seed=seed)
    findings = compare_runs(find_runs(tmp_path))
    assert findings.best == "b" and [comparison.strategy for comparison in findings.comparisons] == ["a"]
    assert "c. No seed is shared with the others" in sentences_of(findings)[1]
    assert "Next is a: 0.100 nats higher" in " ".join(sentences_of(findings))


def test_balance_specialisation_and_dead_experts_are_reported(tmp_path):
    make_run(tmp_path / "a", "none", nats=2.0, maxvio=2.5, bits=0.9)
    make_run(tmp_path / "b", "lbl", nats=2.1, maxvio=0.2, bits=0.1)
    make_run(tmp_path / "c", "loss-free", nats=2.4, maxvio=0.3, bits=0.5)
    headline, quality, balance, information, dead = sentences_of(compare_runs(find_runs(tmp_path)))
    assert "lbl has the most even load: MaxVio 0.200, against 2.500 with none." in headline
    assert "none reaches a loss of 2.000 nats per token (perplexity 7.39)" in quality
    assert (
        "lbl spreads" in balance
        and "1.20 times the mean" in balance
        and "The least even is none: 3.50 times" in balance
    )
    assert "under none: 0.900 of at most 1.00 bits" in information and "under lbl: 0.100 bits" in information
    assert "of 8 in all layers together: none 3, lbl 3" in dead


def test_a_diverged_run_is_named_and_left_out(tmp_path):
    make_run(tmp_path / "a", "none", nats=math.nan)
    make_run(tmp_path / "b", "lbl")
    findings = compare_runs(find_runs(tmp_path))
    assert (
        "Only one strategy, lbl, has results" in sentences_of(findings)[0]
        and "none diverged" in sentences_of(findings)[1]
    )
    path = write_report(tmp_path)
    assert cells(own_text(path), "h-table")[0][1] == "not finite"
    assert data_of(path)["table"]["rows"][0][data_of(path)["table"]["columns"].index("val_nats")] is None


def test_the_page_of_one_strategy_compares_nothing(tmp_path):
    make_run(tmp_path / "a", "lbl", maxvio=0.5)
    make_run(tmp_path / "b", "lbl", seed=1, maxvio=0.5)
    text = own_text(path := write_report(tmp_path))
    assert "<title>Training with one strategy · equipoise</title>" in text and "Who won" not in text
    assert "plot-outcome" not in text and "outcome" not in data_of(path)["figures"]
    assert "On the test text, on average over layers, the busiest expert carries 1.50 times the mean load" in " ".join(
        text.split()
    )
    make_run(tmp_path / "c", "none", maxvio=0.7)
    text = own_text(path := write_report(tmp_path))
    assert "Who won" in text and "plot-outcome" in text and "outcome" in data_of(path)["figures"]
    assert "spreads the test text most evenly" in text


def test_the_page_compares_with_the_best(tmp_path):
    runs_of(tmp_path, best=[2.0, 3.0, 2.5], worse=[2.1, 3.12, 2.59])
    assert cells(own_text(write_report(tmp_path)), "h-outcome") == [
        ["worse", "+0.103 0.065 … 0.141", "significant", "+0.10 0.10 … 0.10"]
    ]


def test_data_holds_the_counts_of_the_records(tmp_path):
    make_run(tmp_path / "a", "lbl", load=SPLIT)
    data = data_of(write_report(tmp_path))
    [model] = data["models"]
    assert model["load"] == [[SPLIT[domain][layer] for domain in SPLIT] for layer in range(2)]
    assert model["domains"] == ["prose", "code"] and model["layers"] == ["1", "2"] and data["cap"] == 4


def test_load_over_time_is_relative_to_even(tmp_path):
    make_run(tmp_path / "a", "lbl", steps=4)
    [time] = data_of(write_report(tmp_path))["times"]
    cells_of = base64.b64decode(time["cells"])
    assert time["steps"] == [1, 2, 3, 4] and time["shape"] == [4, 2, 4]
    at = lambda step, layer, expert: cells_of[(step * 2 + layer) * 4 + expert] * time["unit"]  # noqa: E731
    assert at(2, 0, 0) == pytest.approx(12 / 5, abs=0.011) and at(2, 0, 3) == 0 and at(3, 1, 2) == pytest.approx(1)


def test_typical_tokens_come_with_an_audit_of_the_same_text_only(tmp_path):
    run = make_run(tmp_path / "a", "lbl", load=SPLIT)
    audit = make_audit(SPLIT)
    write_json(run.path / "audit.json", audit)
    [model] = data_of(write_report(tmp_path))["models"]
    assert model["typical"][0][0] == [["the", 0.75, 9]]
    audit["layers"][0]["load_by_domain"][0][0] += 1
    write_json(run.path / "audit.json", audit)
    [model] = data_of(write_report(tmp_path))["models"]
    assert model["typical"] == [[], []]
    (run.path / "audit.json").write_text("{")
    text = own_text(write_report(tmp_path))
    assert "<strong>without its audit</strong>" in text and [row[0] for row in cells(text, "h-table")] == ["lbl"]


def test_cost_under_expert_parallelism_by_hand(tmp_path):
    make_run(tmp_path / "a", "lbl", load=SPLIT)
    # pooled: 10 10 10 10 and 6 3 2 1: pairs 20 20 and 9 3, so 1 and 1.5; experts 1 and 2
    assert cells(own_text(write_report(tmp_path)), "h-cost") == [["lbl", "1.25 1.50", "1.50 2.00"]]


def test_alerts_of_a_run_are_among_its_notes(tmp_path):
    run = make_run(tmp_path / "a", "lbl", steps=2, last=1, finish=False)
    row = {"step": 2, "loss": 1.0, "maxvio_batch": 0.5, "alerts": ["expert 3 of layer 1 is dead"]}
    run.append("steps", row)
    assert "step 2: expert 3 of layer 1 is dead" in own_text(write_report(tmp_path))


def test_an_audit_has_its_own_page(tmp_path):
    write_json(tmp_path / "audit.json", make_audit(SPLIT) | {"words": ["layer 1: collapsed"], "notes": ["few tokens"]})
    path = write_report(tmp_path)
    text = own_text(path)
    assert "1 of 2 layers has a balance problem" in text and "few tokens" in text
    assert cells(text, "h-layers")[1][:3] == ["2", "1.000", "0.020"]
    assert cells(text, "h-domains") == [["prose", "20", "2.000"], ["code", "20", "3.000"]]
    data = data_of(path)
    assert data["models"][0]["partners"][0][1] == [[0, 0.5]]
    assert set(data["figures"]) == {"layers", "cost"}


def test_a_report_of_several_audits_is_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "audit.json", make_audit(SPLIT))
    with pytest.raises(EquipoiseError, match="shows one audit: .* contains a, b"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda audit: audit.update(format=7), "must have format 1: got 7"),
        (lambda audit: audit.pop("layers"), "must contain layers"),
        (
            lambda audit: audit.update(layers=[]),
            "must contain layers in the right form: list should have at least 1 item",
        ),
        (lambda audit: audit["layers"][0]["load_by_domain"][0].pop(), "4 experts in 2 domains"),
    ],
)
def test_a_damaged_audit_raises(tmp_path, change, reason):
    audit = make_audit(SPLIT)
    change(audit)
    write_json(tmp_path / "audit.json", audit)
    with pytest.raises(EquipoiseError, match=reason):
        write_report(tmp_path)


def test_page_reaches_every_layer_and_begins_with_the_last(tmp_path):
    make_run(tmp_path / "a")
    inputs = re.findall(
        r'<input type="radio" name="layer" value="(\d)"( checked)?><span>(\d)', own_text(write_report(tmp_path))
    )
    assert inputs == [("0", "", "1"), ("1", " checked", "2")]


def test_curves_hold_every_step_and_label_means(tmp_path):
    make_run(tmp_path / "a", "none", steps=20)
    figure = figures.curve(read_records(tmp_path).steps(), "maxvio_batch", log=True)
    assert figure.layout.meta["window"] == 1 and list(figure.data[0].y[:3]) == [1.0, 0.5, 0.33333]
    make_run(tmp_path / "b", "lbl", steps=1000)
    figure = figures.curve(read_records(tmp_path).steps(), "loss")
    assert figure.layout.meta["window"] == 3
    assert figure.data[1].y[0] == pytest.approx((4 + 2 + 4 / 3) / 3, rel=1e-4)
    assert "Each point is the mean over 3 steps." in own_text(write_report(tmp_path))


def test_names_from_outside_are_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x>"
    make_run(
        tmp_path / "a", evil, load={evil: EVEN["prose"], "code": EVEN["code"]}, notes=[evil], command=evil, arch=evil
    )
    make_run(tmp_path / "b", "lbl", load={evil: EVEN["prose"], "code": EVEN["code"]})
    make_run(tmp_path / "c", "lbl", seed=1, last=3, finish=False)
    text = own_text(write_report(tmp_path))
    assert "<script>alert" not in text and "<img" not in text and text.count("</script>") == 1
    traces = [trace for figure in data_of(tmp_path / "report.html")["figures"].values() for trace in figure["data"]]
    assert traces and all("<" not in trace["name"] for trace in traces)  # plotly reads HTML


def test_run_without_result_is_marked_and_left_out_of_the_table(tmp_path):
    make_run(tmp_path / "a", "none")
    make_run(tmp_path / "b", "lbl", last=8, finish=False)
    text = own_text(write_report(tmp_path))
    assert "<code>b</code>: not finished: 8 of 20 steps" in text
    assert [row[0] for row in cells(text, "h-table")] == ["none"]
    assert "step 8 (not finished)" in text.replace("Step", "step")
    traces = data_of(tmp_path / "report.html")["figures"]["loss"]["data"]
    assert [trace["name"] for trace in traces] == ["none", "lbl (not finished)"]


def test_page_is_drawn_when_no_run_is_finished(tmp_path):
    make_run(tmp_path / "b", "lbl", last=8, finish=False)
    text = own_text(write_report(tmp_path / "b"))
    assert "No run has finished yet" in text and "not finished: 8 of 20 steps" in text


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("config.json", "{", "config.json must be JSON"),
        ("config.json", '{"format": 1}', "must contain strategy"),
        ("config.json", '{"format": 99}', "must have format 1"),
        ("steps.jsonl", "{oops\n{}\n", "line 1 is damaged"),
        ("evaluations.jsonl", '{"step":1,"domains":{"prose":{"load":[[1,2]]}}}\n', "2 layers of 4 experts"),
        ("result.json", '{"val_nats": 1}', "must contain val_perplexity"),
        ("result.json", "nothing", "result.json must be JSON"),
    ],
)
def test_damaged_run_is_named_and_the_others_are_drawn(tmp_path, name, content, reason):
    make_run(tmp_path / "a", "none")
    broken = make_run(tmp_path / "broken", "lbl")
    (broken.path / name).write_text(content)
    text = own_text(write_report(tmp_path))
    assert "<code>broken</code>: <strong>damaged</strong>" in text and reason in text
    assert str(tmp_path) not in text
    assert [row[0] for row in cells(text, "h-table")] == ["none"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"val_nats": 2.5}, "val_nats is 2.5 and 2.0"),
        ({"split": "selection"}, "split is 'selection' and 'test'"),
        ({"step": 19}, "step is 19 and 20"),
        ({"domains": {"prose": {"load": EVEN["prose"], "nats": 9.0}}}, "nats of prose is 9.0 and 2.0"),
    ],
)
def test_a_finished_run_must_agree_with_its_last_evaluation(tmp_path, change, reason):
    make_run(tmp_path / "a", "none")
    broken = make_run(tmp_path / "broken", "lbl")
    row = list(broken.rows("evaluations"))[-1] | change
    (broken.path / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    (problem,) = read_records(tmp_path).problems
    assert problem.kind == "damaged" and reason in problem.reason and "broken/evaluations.jsonl" in problem.reason


def test_a_diverged_difference_beyond_any_exponent_is_drawn(tmp_path):
    make_run(tmp_path / "a", "none", nats=2.0)
    run = make_run(tmp_path / "b", "lbl", nats=600.0)
    for name in ("result.json", "evaluations.jsonl"):
        text = (run.path / name).read_text().replace('"val_nats": 600.0', '"val_nats": 900.0')
        (run.path / name).write_text(text.replace('"val_nats":600.0', '"val_nats":900.0'))
    assert "898.000 nats higher" in own_text(write_report(tmp_path))


def test_second_run_of_the_same_strategy_and_seed_is_left_out(tmp_path):
    make_run(tmp_path / "a", nats=2.0)
    make_run(tmp_path / "b", nats=3.0)
    text = own_text(write_report(tmp_path))
    assert "<code>b</code>: <strong>left out</strong>, it has the same strategy and seed as a" in text


def test_differing_settings_are_named(tmp_path):
    make_run(tmp_path / "a", "none", learning_rate=1e-3)
    make_run(tmp_path / "b", "lbl", learning_rate=2e-3)
    assert unequal_terms([run.config for run in find_runs(tmp_path)]) == ["learning_rate"]
    assert "The runs differ in <strong>learning_rate</strong>" in own_text(write_report(tmp_path))


def test_command_line_options_are_compared_too(tmp_path):
    make_run(tmp_path / "a", "none", options={"weight_decay": 0.1, "strategy": "none"}, corpus_fingerprint="1")
    make_run(tmp_path / "b", "lbl", options={"weight_decay": 0.2, "strategy": "lbl"}, corpus_fingerprint="2")
    assert unequal_terms([run.config for run in find_runs(tmp_path)]) == ["corpus_fingerprint", "weight_decay"]


def test_notes_command_and_versions_are_shown(tmp_path):
    make_run(tmp_path / "a", "none", notes=["the rate is too short"])
    text = own_text(write_report(tmp_path))
    assert "the rate is too short" in text and "equipoise compare --out runs" in text and "0.1.0" in text


def test_runs_without_an_evaluation_raise_and_keep_the_old_page(tmp_path):
    run = make_run(tmp_path / "a", last=3, finish=False)
    (run.path / "evaluations.jsonl").unlink()
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(
        EquipoiseError, match="needs at least one run with an evaluation: .* not finished: 3 of 20 steps"
    ) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "report.html").read_text() == "old"
    with pytest.raises(EquipoiseError, match="must contain runs"):
        (tmp_path / "empty").mkdir()
        write_report(tmp_path / "empty")


def test_page_is_self_contained_and_the_same_each_time(tmp_path):
    make_run(tmp_path / "a")
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert len(first) < 2.5e6
    text = own_text(tmp_path / "report.html")
    assert not re.search(r"""(src|href)=["']?(http|//)|@import|url\(""", text)
    assert re.findall(r"<link[^>]*>", text) == ['<link rel="icon" href="data:,">']


def test_page_has_language_headings_in_order_and_captions(tmp_path):
    make_run(tmp_path / "a", notes=["a note"])
    make_run(tmp_path / "b", "lbl")
    text = own_text(write_report(tmp_path))
    levels = [int(level) for level in re.findall(r"<h(\d)", text)]
    assert '<html lang="en">' in text and levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    assert text.count("<figure aria-label=") == text.count("<figcaption>") == 10
    assert all('scope="' in cell for cell in re.findall(r"<th\b[^>]*>", text))


def test_report_imports_no_torch(tmp_path):
    make_run(tmp_path / "a")
    code = "import sys; from equipoise_lab.report import write_report; write_report(sys.argv[1])"
    code += "; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "False\n"


def test_large_numbers_are_abbreviated():
    assert [abbreviate(x) for x in (13_107_200, 999_950, 8192, 90, None)] == ["13.1 M", "1 M", "8.19 k", "90", "?"]


@contextmanager
def browser_page(path, **options):
    """The drawn page in a browser. Errors, and requests to anything but the page, fail the test."""
    api = pytest.importorskip("playwright.sync_api")
    errors, requests = [], []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(**options)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        yield page
        browser.close()
    assert errors == [] and [url for url in requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]


def downloaded(page, button):
    with page.expect_download() as waiting:
        button.click()
    return Path(waiting.value.path()).read_bytes()


in_browser = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's Chromium")]


class TestInABrowser:
    pytestmark = in_browser

    @pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
    def test_it_draws_and_its_controls_work(self, tmp_path, width, scheme):
        make_run(tmp_path / "a", "none")
        make_run(tmp_path / "b", "<i>lbl</i>", load=SPLIT)
        with browser_page(
            write_report(tmp_path), viewport={"width": width, "height": 900}, color_scheme=scheme
        ) as page:
            experts = "() => document.getElementById('heat-1').data[0].x.join()"
            assert page.evaluate(experts) == "0,2,1,3"
            page.locator("input[name=layer]:checked").focus()
            page.keyboard.press("ArrowLeft")
            page.wait_for_function(f"({experts})() === '0,1,2,3'")
            page.locator("#sort").select_option("load")
            page.keyboard.press("Tab")
            page.locator("input[name=layer][value='1']").check(force=True)
            page.wait_for_function(f"({experts})() === '0,1,2,3'")  # 6, 3, 2, 1
            page.locator("button[data-strategy='0']").click()
            page.wait_for_function("() => document.getElementById('plot-loss').data[0].visible === false")
            page.locator("#time-model").select_option("0")
            page.locator("#time-layer").select_option("0")
            cells_of = "() => document.getElementById('plot-time').data[0].z[0].slice(0, 2).join()"
            assert page.evaluate(cells_of) == "1.34,2"  # 4 * 1 / 3 and 4 * 2 / 4 in steps of 0.02
            assert page.evaluate("document.documentElement.scrollWidth") == width

    def test_tables_sort_by_number_and_by_name(self, tmp_path):
        for i, (name, nats) in enumerate([("b", 10.5), ("a", 9.5), ("c", math.nan)]):
            make_run(tmp_path / str(i), name, nats=nats)
        with browser_page(write_report(tmp_path)) as page:
            table = page.locator("section[aria-labelledby=h-table] table")
            names = lambda: table.locator("tbody th").all_inner_texts()  # noqa: E731
            table.get_by_role("button", name="Loss, nats").click()
            assert names() == ["a", "b", "c"]
            table.get_by_role("button", name="Loss, nats").click()
            assert names() == ["b", "a", "c"]  # cells without a number stay last
            table.get_by_role("button", name="Strategy").focus()
            page.keyboard.press("Enter")
            assert names() == ["a", "b", "c"]
            assert table.locator("th[aria-sort=ascending]").inner_text().startswith("Strategy")

    def test_hovering_shows_the_number_and_the_typical_tokens(self, tmp_path):
        run = make_run(tmp_path / "a", "lbl", load=SPLIT)
        write_json(run.path / "audit.json", make_audit(SPLIT))
        with browser_page(write_report(tmp_path), viewport={"width": 1280, "height": 900}) as page:
            page.locator("input[name=layer][value='0']").check(force=True)
            plot = page.locator("#heat-0 .nsewdrag").first
            plot.scroll_into_view_if_needed()
            box = plot.bounding_box()
            page.mouse.move(box["x"] + box["width"] / 8, box["y"] + box["height"] / 4)
            page.wait_for_selector("#heat-0 .hovertext")
            text = page.locator("#heat-0 .hovertext").text_content()
            assert "prose, expert 0: 2.00 × even" in text and "“the” (75 %)" in text
            row = page.locator("#experts-table tbody tr").first.locator("td").all_inner_texts()
            assert row == ["1.00", "prose", "2.00", "1 (50 %)", "“the” (75 %)"]

    def test_the_theme_is_chosen_and_kept(self, tmp_path):
        make_run(tmp_path / "a")
        with browser_page(write_report(tmp_path), color_scheme="light") as page:
            color = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
            scale = "() => JSON.stringify(document.getElementById('heat-0').layout.coloraxis.colorscale)"
            light, light_scale = color(), page.evaluate(scale)
            page.locator("#theme").click()
            assert page.locator("#theme").inner_text() == "theme: light" and color() == light
            page.locator("#theme").click()
            assert page.locator("#theme").inner_text() == "theme: dark" and color() != light
            assert page.evaluate(scale) != light_scale
            page.locator("#theme").click()
            assert page.locator("#theme").inner_text() == "theme: auto" and color() == light

    def test_files_hold_the_records(self, tmp_path):
        runs = [make_run(tmp_path / "a", "none", nats=2.0), make_run(tmp_path / "b", 'l,"b"l', load=SPLIT, nats=2.5)]
        with browser_page(write_report(tmp_path), accept_downloads=True) as page:
            tools = lambda id: page.locator(f".tools[data-csv='{id}']").first  # noqa: E731
            rows = list(csv.DictReader(io.StringIO(downloaded(page, tools("runs").get_by_text("CSV")).decode())))
            assert [(r["strategy"], float(r["val_nats"])) for r in rows] == [("none", 2.0), ('l,"b"l', 2.5)]
            for index, run in enumerate(runs):
                text = downloaded(page, tools(f"heat-{index}").get_by_text("CSV")).decode()
                csv_rows = list(csv.DictReader(io.StringIO(text)))
                evaluation = list(run.rows("evaluations"))[-1]["domains"]
                assert [(r["domain"], int(r["expert"]), int(r["load"])) for r in csv_rows] == [
                    (domain, e, load) for domain in evaluation for e, load in enumerate(evaluation[domain]["load"][1])
                ]
                assert {r["strategy"] for r in csv_rows} == {run.config["strategy"]}
            text = downloaded(page, tools("all-1").get_by_text("CSV")).decode()
            loads = [int(r["load"]) for r in csv.DictReader(io.StringIO(text))]
            assert loads == [10, 10, 10, 10, 6, 3, 2, 1]
            text = downloaded(page, tools("plot-loss").get_by_text("CSV")).decode()
            csv_rows = list(csv.DictReader(io.StringIO(text)))
            steps = list(runs[0].rows("steps"))
            assert [(int(r["x"]), float(r["y"])) for r in csv_rows[:20]] == [
                (row["step"], pytest.approx(row["loss"], rel=1e-4)) for row in steps
            ]
            text = downloaded(page, tools("time").get_by_text("CSV")).decode()
            assert len(text.splitlines()) == 1 + 20 * 4
            svg = downloaded(page, page.locator(".tools[data-plot='plot-outcome']").get_by_text("SVG"))
            assert svg.startswith(b"<svg") and b"MaxVio on test text" in svg
            png = downloaded(page, page.locator(".tools[data-plot='heat-0']").get_by_text("PNG"))
            assert png.startswith(b"\x89PNG")

    def test_an_audit_draws(self, tmp_path):
        write_json(tmp_path / "audit.json", make_audit(SPLIT))
        with browser_page(write_report(tmp_path), viewport={"width": 390, "height": 900}) as page:
            assert page.locator("#experts-table thead th").all_inner_texts() == [
                "Expert", "Load, × even", "Top domain", "× even in it", "Often with", "Typical tokens",
            ]  # fmt: skip
            assert page.locator("#plot-layers .scatterlayer path.js-line").count() == 4
            page.locator("#text").select_option("code")
            page.wait_for_function("() => document.getElementById('all-0').data[0].z[0].join() === '2,2,0,0'")
            assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_the_page_of_a_large_model_fits_into_eight_megabytes(tmp_path):
    """64 layers of 256 experts under two strategies, eight domains, ten typical tokens per expert (three shown)."""
    layers, experts, domains = 64, 256, [f"domain{i}" for i in range(8)]
    random = np.random.default_rng(0)
    for strategy in ("none", "loss-free"):
        load = {d: random.poisson(40 * random.lognormal(0, 1, (layers, experts))).tolist() for d in domains}
        names = [f"model.layers.{i}.mlp.gate" for i in range(layers)]
        run = make_run(tmp_path / strategy, strategy, load=load, steps=3, num_experts=experts, layers=names)
        (run.path / "loads.jsonl").unlink()
        for step in range(1, 4):
            run.append("loads", {"step": step, "load": random.poisson(32, (layers, experts)).tolist()})
        audit = make_audit({d: rows[:2] for d, rows in load.items()})
        one = audit["layers"][0] | {"experts": experts, "k": 2, "partners": []}
        audit["layers"] = [
            one
            | {
                "layer": names[i],
                "load_by_domain": [load[d][i] for d in domains],
                "typical_tokens": [
                    [{"text": f" w{random.integers(50_000)}", "share": random.random(), "count": 9} for _ in range(10)]
                    for _ in range(experts)
                ],
            }
            for i in range(layers)
        ]
        write_json(run.path / "audit.json", audit)
    path = write_report(tmp_path)
    data = data_of(path)
    assert len(data["models"][1]["typical"][63][255]) == 3 and len(data["times"]) == 2
    assert path.stat().st_size <= 8e6
