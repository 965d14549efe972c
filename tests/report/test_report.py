import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.errors import EquipoiseError
from equipoise.records import Run, find_runs
from equipoise.report import COLUMNS, summary_rows, write_report
from equipoise.report.figures import curve, heat_map, layer_labels, relative_load, strategy_styles
from equipoise.report.page import count, embed
from equipoise.report.reading import read_runs
from equipoise.report.summary import findings, unequal_terms

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
        "gate": "sigmoid",
        "command": "equipoise compare --out runs",
        "versions": {"equipoise": "0.1.0"},
        "notes": [],
        **config,
    }
    run = Run.create(path, settings)
    for step in range(1, (last or steps) + 1):
        run.append("steps", {"step": step, "loss": 4.0 / step, "maxvio_batch": 1.0 / step})
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
    """The page without plotly.js."""
    from plotly.offline import get_plotlyjs

    return path.read_text(encoding="utf-8").replace(get_plotlyjs(), "")


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
        ["none", "2.000", "7.39", "1.000", "0.500", "0.021", "0.750", "0.250", "3.0", "1,234"],
        ["lbl", "2.100", "8.17", "1.050", "0.100", "0.021", "0.750", "0.250", "3.0", "1,234"],
    ]
    assert cells(text, "h-domains") == [["none", "2.000", "3.000"], ["lbl", "2.100", "3.100"]]
    assert all(column.definition.split(".")[0][:20] in text.replace("&#39;", "'") for column in COLUMNS)
    assert list(tmp_path.glob(".*")) == []  # nothing is left aside


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


def test_findings_name_best_and_worst_and_do_not_read_small_differences(tmp_path):
    make_run(tmp_path / "a", "none", nats=2.0, maxvio=2.5, bits=0.9)
    make_run(tmp_path / "b", "lbl", nats=2.1, maxvio=0.2, bits=0.1)
    make_run(tmp_path / "c", "loss-free", nats=2.4, maxvio=0.3, bits=0.5)
    balance, information, dead, quality, caution = (re.sub("<[^>]*>", "", s) for s in findings(find_runs(tmp_path)))
    assert "lbl spreads" in balance and "1.20 times the mean" in balance and "none, with 3.50 times" in balance
    assert "under none: 0.900 bits of at most 1.00" in information and "under lbl: 0.100 bits" in information
    assert "out of 8 in all layers: none 3, lbl 3" in dead
    assert "none has the lowest validation loss: 2.000 nats, perplexity 7.39" in quality
    assert "less than 0.15 nats: lbl by 0.100; this is not read as a result" in quality
    assert "0.15 nats or more: loss-free by 0.400" in quality
    assert "One seed decides nothing about perplexity below a stated difference" in caution


def test_findings_pair_seeds(tmp_path):
    for seed, (a, b) in enumerate([(2.0, 2.1), (3.0, 3.3)]):
        make_run(tmp_path / f"a{seed}", "none", seed, nats=a)
        make_run(tmp_path / f"b{seed}", "lbl", seed, nats=b)
    quality, caution = (re.sub("<[^>]*>", "", s) for s in findings(find_runs(tmp_path))[-2:])
    assert "lbl by 0.200 ± 0.141" in quality and "paired by seed" in quality  # of 0.1 and 0.3
    assert caution.startswith("Caution. 2 seeds decide nothing")


def test_findings_leave_out_what_diverged(tmp_path):
    make_run(tmp_path / "a", "none", nats=math.nan)
    make_run(tmp_path / "b", "lbl")
    said = " ".join(findings(find_runs(tmp_path)))
    assert "<code>none</code> <strong>diverged</strong>" in said and "Only <code>lbl</code> is finished" in said
    text = own_text(write_report(tmp_path))
    assert cells(text, "h-table")[0][1] == "not finite"
    assert "NaN" not in re.search(r'<script id="data".*?</script>', text, re.S).group()


def test_relative_load_by_hand():
    assert relative_load([6, 1, 1, 0]) == [3.0, 0.5, 0.5, 0.0]
    assert relative_load([7, 7]) == [1.0, 1.0]
    assert relative_load([0, 0]) == [None, None]


def test_heat_map_holds_relative_load_sorted_by_domain(tmp_path):
    make_run(tmp_path / "a", "lbl", load=SPLIT)
    [reading], _ = read_runs(tmp_path)
    figure = heat_map(reading)
    assert figure["layers"][0] == {"experts": ["0", "1", "2", "3"], "z": [[2, 2, 0, 0], [0, 0, 2, 2]]}
    # prose 6,0,2,0 of 8 and code 0,3,0,1 of 4: experts 0, 2 are prose's, 1, 3 are code's, each by how much
    assert figure["layers"][1] == {"experts": ["0", "2", "1", "3"], "z": [[3, 1, 0, 0], [0, 0, 3, 1]]}
    embedded = re.search(r'<script id="data"[^>]*>(.*?)</script>', own_text(write_report(tmp_path)), re.S).group(1)
    data = json.loads(embedded)
    assert data["heat"][0]["layers"] == figure["layers"] and data["cap"] == 4


def test_page_reaches_every_layer_and_begins_with_the_last(tmp_path):
    make_run(tmp_path / "a")
    inputs = re.findall(
        r'<input type="radio" name="layer" value="(\d)"( checked)?><span>(\d)', own_text(write_report(tmp_path))
    )
    assert inputs == [("0", "", "1"), ("1", " checked", "2")]


def test_curves_hold_every_step_and_label_means(tmp_path):
    make_run(tmp_path / "a", "none", steps=20)
    readings, _ = read_runs(tmp_path)
    figure, window = curve(readings, "maxvio_batch", title="", log=True)
    assert window == 1 and figure["data"][0]["y"][:3] == [1.0, 0.5, 0.33333]
    make_run(tmp_path / "b", "lbl", steps=1000)
    readings, _ = read_runs(tmp_path)
    figure, window = curve(readings, "loss", title="", log=False)
    assert window == 3 and figure["data"][1]["y"][0] == pytest.approx((4 + 2 + 4 / 3) / 3, rel=1e-4)
    assert "Each point is the mean over 3 steps." in own_text(write_report(tmp_path))


def test_names_from_outside_are_escaped(tmp_path):
    evil = "</script><script>alert(1)</script><img src=x>"
    make_run(
        tmp_path / "a", evil, load={evil: EVEN["prose"], "code": EVEN["code"]}, notes=[evil], command=evil, arch=evil
    )
    make_run(tmp_path / "b", "lbl", load={evil: EVEN["prose"], "code": EVEN["code"]})
    make_run(tmp_path / "c", "lbl", seed=1, last=3, finish=False)
    text = own_text(write_report(tmp_path))
    assert "<script>alert" not in text and "<img" not in text and text.count("</script>") == 3
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S).group(1))
    assert all("<" not in trace["name"] for figure in data["curves"] for trace in figure["data"])  # plotly reads HTML
    assert all("<" not in tick for heat in data["heat"] for tick in heat["layout"]["yaxis"]["ticktext"])
    assert "<" not in embed({"a": "</script><!--"}) and json.loads(embed("<")) == "<"


def test_run_without_result_is_marked_and_left_out_of_the_table(tmp_path):
    make_run(tmp_path / "a", "none")
    make_run(tmp_path / "b", "lbl", last=8, finish=False)
    text = own_text(write_report(tmp_path))
    assert "<code>b</code>: not finished: 8 of 20 steps" in text
    assert [row[0] for row in cells(text, "h-table")] == ["none"]
    assert "step 8 (not finished)" in text.replace("Step", "step") and "lbl (not finished)" in text


def test_page_is_drawn_when_no_run_is_finished(tmp_path):
    make_run(tmp_path / "b", "lbl", last=8, finish=False)
    text = own_text(write_report(tmp_path / "b"))
    assert "No run is finished" in text and "not finished: 8 of 20 steps" in text


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("config.json", "{", "config.json must be JSON"),
        ("config.json", '{"format": 1}', "must hold strategy"),
        ("config.json", '{"format": 99}', "must have format 1"),
        ("steps.jsonl", "{oops\n{}\n", "line 1 is damaged"),
        ("evaluations.jsonl", '{"step":1,"domains":{"prose":{"load":[[1,2]]}}}\n', "2 layers of 4 experts"),
        ("result.json", '{"val_nats": 1}', "must hold val_perplexity"),
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


def test_second_run_of_the_same_strategy_and_seed_is_left_out(tmp_path):
    make_run(tmp_path / "a", nats=2.0)
    make_run(tmp_path / "b", nats=3.0)
    text = own_text(write_report(tmp_path))
    assert "<code>b</code>: <strong>left out</strong>, the same strategy and seed as a" in text


def test_runs_on_unequal_terms_are_said_to_be(tmp_path):
    make_run(tmp_path / "a", "none", learning_rate=1e-3)
    make_run(tmp_path / "b", "lbl", learning_rate=2e-3)
    assert unequal_terms([run.config for run in find_runs(tmp_path)]) == ["learning_rate"]
    assert "The runs differ in <strong>learning_rate</strong>" in own_text(write_report(tmp_path))


def test_options_that_only_the_command_line_knows_are_terms_too(tmp_path):
    make_run(tmp_path / "a", "none", options={"weight_decay": 0.1, "strategy": "none"}, corpus_fingerprint="1")
    make_run(tmp_path / "b", "lbl", options={"weight_decay": 0.2, "strategy": "lbl"}, corpus_fingerprint="2")
    assert unequal_terms([run.config for run in find_runs(tmp_path)]) == ["corpus_fingerprint", "weight_decay"]


def test_notes_command_and_versions_are_shown(tmp_path):
    make_run(tmp_path / "a", "none", notes=["the rate is too short"])
    text = own_text(write_report(tmp_path))
    assert "the rate is too short" in text and "equipoise compare --out runs" in text and "0.1.0" in text


def test_no_evaluation_at_all_is_an_error_and_keeps_the_old_page(tmp_path):
    run = make_run(tmp_path / "a", last=3, finish=False)
    (run.path / "evaluations.jsonl").unlink()
    (tmp_path / "report.html").write_text("old")
    with pytest.raises(
        EquipoiseError, match="needs one run with an evaluation: .* not finished: 3 of 20 steps"
    ) as caught:
        write_report(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "report.html").read_text() == "old"
    with pytest.raises(EquipoiseError, match="must hold runs"):
        (tmp_path / "empty").mkdir()
        write_report(tmp_path / "empty")


def test_page_is_self_contained_and_the_same_each_time(tmp_path):
    make_run(tmp_path / "a")
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first
    assert len(first) < 6e6
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
    assert text.count("<figure aria-label=") == text.count("<figcaption>") == 4
    assert all('scope="' in cell for cell in re.findall(r"<th\b[^>]*>", text))


def test_report_imports_no_torch(tmp_path):
    make_run(tmp_path / "a")
    code = "import sys; from equipoise.report import write_report; write_report(sys.argv[1])"
    code += "; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == "False\n"


def test_strategies_keep_a_colour_of_their_own():
    styles = strategy_styles(["none", *(f"s{i}" for i in range(14))])
    assert styles["none"]["color"] == "#808080"
    assert len({tuple(style.values()) for style in styles.values()}) == 15


def test_layer_labels_are_numbers_where_these_differ():
    assert layer_labels(["model.layers.1.gate", "model.layers.12.gate"]) == ["1", "12"]
    assert layer_labels(["a.1.x", "a.1.y"]) == ["a.1.x", "a.1.y"]
    assert layer_labels(["gate"]) == ["gate"]


def test_count_is_short():
    assert [count(x) for x in (13_107_200, 8192, 90, None)] == ["13.1 M", "8.19 k", "90", "?"]


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Debian's Chromium")
@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_page_draws_in_a_browser_without_errors_or_requests(tmp_path, width, scheme):
    api = pytest.importorskip("playwright.sync_api")
    make_run(tmp_path / "a", "none")
    make_run(tmp_path / "b", "<i>lbl</i>", load=SPLIT)
    path = write_report(tmp_path)
    errors, requests = [], []
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("#heat-1 .heatmaplayer image, #heat-1 .hm image", state="attached")
        experts = "() => document.getElementById('heat-1').data[0].x.join()"
        assert page.evaluate(experts) == "0,2,1,3"
        page.locator("input[name=layer]:checked").focus()
        page.keyboard.press("ArrowLeft")
        page.wait_for_function(f"({experts})() === '0,1,2,3'")
        page.locator("button[data-strategy='0']").click()
        page.wait_for_function("() => document.getElementById('curve-0').data[0].visible === false")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        browser.close()
    assert errors == [] and requests == [path.as_uri()]
