"""The page without a browser: its tables, its data and its texts."""

import base64
import json
import math
import os
import re
import statistics
import subprocess
import sys
import warnings

import numpy as np
import pytest
from helpers.recorded_runs import EVEN, SPLIT, cells, data_of, make_audit, make_run, own_text, runs_of, sentences_of

from equipoise.errors import EquipoiseError
from equipoise_lab.analysis import figures
from equipoise_lab.analysis.summary import COLUMNS, summary_rows, unequal_terms
from equipoise_lab.analysis.tables import read_records
from equipoise_lab.records import find_runs, write_json
from equipoise_lab.report import write_report
from equipoise_lab.report.contents import abbreviate
from equipoise_lab.report.findings import compare_runs
from equipoise_lab.report.stills import still


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
    assert "<title>Training with one strategy · equipoise</title>" in text and "Loss, balance" not in text
    assert "plot-outcome" not in text and "outcome" not in data_of(path)["figures"]
    assert "On the test text, on average over layers, the busiest expert carries 1.50 times the mean load" in " ".join(
        text.split()
    )
    make_run(tmp_path / "c", "none", maxvio=0.7)
    text = own_text(path := write_report(tmp_path))
    assert (
        "Loss, balance, specialisation</h2>" in text
        and "plot-outcome" in text
        and "outcome" in data_of(path)["figures"]
    )
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
    load = [[SPLIT[domain][layer] for domain in SPLIT] for layer in range(2)]
    assert model["maps"] == [{"step": 20, "split": "test", "load": load}] and data["steps"] == [20]
    assert model["domains"] == ["prose", "code"] and model["layers"] == ["1", "2"] and data["cap"] == 4


def test_maps_are_of_the_last_evaluation_of_each_step(tmp_path):
    """The last step has an evaluation on the selection text, then one on the test text."""
    run = make_run(tmp_path / "a", "lbl", steps=2, last=1, finish=False)
    run.append("steps", {"step": 2, "loss": 1.0, "maxvio_batch": 1.0})
    run.append("loads", {"step": 2, "load": [[1, 1, 1, 1], [1, 1, 1, 1]]})
    for split, load in (("selection", EVEN), ("test", SPLIT)):
        run.append("evaluations", {"step": 2, "split": split, "domains": {d: {"load": load[d]} for d in load}})
    data = data_of(write_report(tmp_path))
    assert [(map["step"], map["split"]) for map in data["models"][0]["maps"]] == [(1, "test"), (2, "test")]
    assert data["models"][0]["maps"][1]["load"][0] == [SPLIT["prose"][0], SPLIT["code"][0]]
    assert data["steps"] == [1, 2] and 'id="at" min="0" max="1"' in own_text(tmp_path / "report.html")


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
    assert cells(own_text(write_report(tmp_path)), "h-cost") == [["lbl", "1.25 (1.50)", "1.50 (2.00)"]]


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


def test_names_that_matplotlib_would_take_for_formulas_are_drawn(tmp_path):
    domains = {"$\\frac$": EVEN["prose"], "a$_{$b": EVEN["code"], "日本語": EVEN["code"]}
    make_run(tmp_path / "a", "$\\frac$", load=domains, finish=False)
    make_run(tmp_path / "b", "lbl", load=domains)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a character without a glyph
        assert write_report(tmp_path).is_file()
    layers = [{"layer": name} for name in ("$\\frac$", "$x_$")]
    measured = {"maxvio": 1.0, "maxvio_floor": 0.1, "domain_information_bits": {"value": 0.5, "bound": 0.1}}
    figure = figures.layers([layer | measured for layer in layers])
    assert still(figure) and still(figure.update_layout(height=10**6))  # of tens of thousands of domains


@pytest.mark.parametrize(
    ("strategy", "config"),
    [
        ("rate=1e999", {"began": "yesterday"}),
        ("x=1.2.3", {"began": "2026-01-01 10:00"}),
        ("x=.", {"began": "aTbTc"}),
        ("x" * 3000, {"layers": ["$a$", "<b>"]}),
    ],
    ids=["infinite", "version", "point", "long"],
)
def test_records_from_elsewhere_may_hold_any_text(tmp_path, strategy, config):
    make_run(tmp_path / "a", strategy, steps=3, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Trained" not in own_text(write_report(tmp_path))


def test_run_without_result_is_marked_and_left_out_of_the_table(tmp_path):
    make_run(tmp_path / "a", "none")
    make_run(tmp_path / "b", "lbl", last=8, finish=False)
    text = own_text(write_report(tmp_path))
    assert "<code>b</code>: not finished: 8 of 20 steps" in text
    said = []
    write_report(tmp_path, said.append)
    assert said == ["b: not finished: 8 of 20 steps"]
    assert [row[0] for row in cells(text, "h-table")] == ["none"]
    assert '<span class="shown-step" data-model="1">step 8</span> (not finished)' in text
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


def test_a_run_without_an_evaluation_shows_its_training(tmp_path):
    run = make_run(tmp_path / "a", last=3, finish=False)
    (run.path / "evaluations.jsonl").unlink()
    text = own_text(write_report(tmp_path))
    assert "No run has an evaluation yet." in text and "not finished: 3 of 20 steps" in text
    assert text.index('id="h-curves"') < text.index('id="h-heat"') < text.index('id="h-table"')
    assert re.findall(r'<a href="#(h-[a-z]+)">', text)[:2] == ["h-curves", "h-heat"]
    data = data_of(tmp_path / "report.html")
    assert data["models"] == [] and len(data["times"]) == 1 and data["steps"] == []


def test_runs_without_a_step_raise_and_keep_the_old_page(tmp_path):
    run = make_run(tmp_path / "a", last=3, finish=False)
    for log in ("evaluations", "steps", "loads"):
        (run.path / f"{log}.jsonl").unlink()
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(EquipoiseError, match="needs at least one run with a step: .* not finished: 0 of 20") as caught:
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


@pytest.mark.parametrize("without", ["none", "lbl"])
def test_a_run_without_loads_is_left_out_of_the_loads_over_time(tmp_path, without):
    """One that trains may have been copied without its largest file."""
    for strategy in ("none", "lbl"):
        run = make_run(tmp_path / strategy, strategy, finish=False)
        if strategy == without:
            (run.path / "loads.jsonl").unlink()
    data = data_of(write_report(tmp_path))
    (other,) = {"none", "lbl"} - {without}
    assert [time["strategy"] for time in data["times"]] == [other]


def test_large_numbers_are_abbreviated():
    assert [abbreviate(x) for x in (13_107_200, 999_950, 8192, 90, None)] == ["13.1 M", "1 M", "8.19 k", "90", "?"]


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
