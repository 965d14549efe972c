"""The page as Chromium draws it."""

import csv
import io
import math
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers.recorded_runs import EVEN, SPLIT, make_audit, make_run

from equipoise_lab.analysis.summary import COLUMNS
from equipoise_lab.analysis.tables import read_records
from equipoise_lab.records import write_json
from equipoise_lab.report import write_report
from equipoise_lab.report.page import Live, write_page

CHROMIUM = Path("/usr/bin/chromium")


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
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]", timeout=60_000)
        yield page
        browser.close()
    assert errors == [] and {url for url in requests if not url.startswith(("data:", "blob:"))} == {path.as_uri()}


def wait_until(page, function):
    """Polls a JavaScript function. ``wait_for_function`` evaluates strings, which the page's policy forbids."""
    deadline = time.monotonic() + 30
    while not page.evaluate(function):
        assert time.monotonic() < deadline, function
        page.wait_for_timeout(50)


def make_pair(folder):
    """Two runs with three evaluations each. In the first two of them the load is even."""
    for name, strategy in (("a", "none"), ("b", "loss-free:rate=1e-3")):
        run = make_run(folder / name, strategy, load=EVEN, steps=10, last=5, finish=False)
        for step, load in ((8, EVEN), (10, SPLIT)):
            for missing in range(sum(1 for _ in run.rows("steps")) + 1, step + 1):
                run.append("steps", {"step": missing, "loss": 4.0 / missing, "maxvio_batch": 1.0, "bias_max": 0.1})
                run.append("loads", {"step": missing, "load": [[1, 1, 1, 1], [2, 2, 2, 2]]})
            rows = {domain: {"nats": 1.0, "load": load[domain]} for domain in load}
            run.append("evaluations", {"step": step, "split": "selection", "maxvio_global": 0.5, "domains": rows})
    return write_report(folder)


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
            wait_until(page, f"({experts})() === '0,1,2,3'")
            page.locator("#sort").select_option("load")
            page.keyboard.press("Tab")
            page.locator("input[name=layer][value='1']").check(force=True)
            wait_until(page, f"({experts})() === '0,1,2,3'")  # 6, 3, 2, 1
            page.locator("button[data-strategy='0']").click()
            wait_until(page, "() => document.getElementById('plot-loss').data[0].visible === false")
            page.locator("#time-run").select_option("0")
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

    def test_a_saved_picture_is_whole(self, tmp_path):
        """Title, strategy, layer, step, seed, legend and colour bar, in light colours on a dark page too."""
        path = make_pair(tmp_path)
        with browser_page(path, accept_downloads=True, color_scheme="dark") as page:
            svg = lambda id: downloaded(page, page.locator(f".tools[data-plot='{id}']").get_by_text("SVG")).decode()  # noqa: E731
            heat = svg("heat-1")
            for part in ("Relative load by domain and expert", "loss-free:rate=1e-3 · layer 2 · step 10 · seed 0"):
                assert part in heat.replace("\xa0", " ")
            for part in ("glm4_moe of 13.1 M parameters", "2 MoE layers", "1 even", "4+", ">load<"):
                assert part in heat.replace("\xa0", " "), part
            assert "rgb(255, 255, 255)" in heat
            curve = svg("plot-loss").replace("\xa0", " ")
            assert "Training loss, nats per token" in curve and "10 steps on corpus · seed 0" in curve
            assert curve.count('class="legendtext"') == 2 and ">none<" in curve

    def test_print_has_whole_pictures(self, tmp_path):
        with browser_page(make_pair(tmp_path)) as page:
            titles = "() => document.querySelectorAll('#heat-0 .gtitle, #heat-0 .colorbar').length"
            assert page.evaluate(titles) == 0
            page.evaluate("dispatchEvent(new Event('beforeprint'))")
            wait_until(page, f"({titles})() === 2")
            page.evaluate("dispatchEvent(new Event('afterprint'))")
            wait_until(page, f"({titles})() === 0")

    def test_the_slider_moves_every_map_to_its_evaluation(self, tmp_path):
        with browser_page(make_pair(tmp_path)) as page:
            first = "() => document.getElementById('heat-1').data[0].z[0].join()"
            assert page.evaluate(first) == "3,1,0,0"  # prose, layer 2: 6, 0, 2, 0 of 8 tokens; 0 and 2 are its experts
            order = page.evaluate("document.getElementById('heat-1').data[0].x.join()")
            page.locator("#at").fill("0")
            wait_until(page, f"({first})() === '1,1,1,1'")
            assert page.evaluate("document.getElementById('heat-1').data[0].x.join()") == order  # columns stay
            assert page.locator("#at-step").inner_text() == "step 5"
            assert page.locator(".shown-step").first.inner_text() == "step 5"
            page.locator("#at").fill("1")
            wait_until(page, "() => document.querySelector('.shown-step').textContent === 'step 8 (selection text)'")
            page.locator("#play").click()
            wait_until(page, f"({first})() === '3,1,0,0'")
            wait_until(page, "() => document.getElementById('play').textContent === 'Play'")

    def test_two_layers_stand_side_by_side(self, tmp_path):
        with browser_page(make_pair(tmp_path), viewport={"width": 1280, "height": 900}) as page:
            assert page.locator("#second-0").is_hidden()
            page.locator("#second").select_option("0")
            wait_until(page, "() => document.getElementById('second-1').data[0].z[0].join() === '2,2,0,0'")
            boxes = [page.locator(f"#{id}").bounding_box() for id in ("heat-1", "second-1")]
            assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
            names = page.locator(".maps").first.locator(".layer-name").all_inner_texts()
            assert names == ["layer 2", "layer 1"]
            page.locator("#second").select_option("")
            assert page.locator("#second-0").is_hidden()

    def test_tables_are_copied_with_the_headings_of_the_page(self, tmp_path):
        make_run(tmp_path / "a", "none", nats=2.0)
        make_run(tmp_path / "b", "lbl:scope=micro_batch", nats=2.1)
        with browser_page(write_report(tmp_path), permissions=["clipboard-read", "clipboard-write"]) as page:
            tools = page.locator(".tools[data-table='results-table']")
            tools.get_by_text("Markdown").click()
            wait_until(
                page, "() => document.querySelector('.tools[data-table=results-table]').textContent.includes('copied')"
            )
            head, sides, none, lbl = page.evaluate("navigator.clipboard.readText()").splitlines()
            titles = ["Strategy", *(column.title for column in COLUMNS)]
            assert head == f"| {' | '.join(titles)} |" and sides == f"| --- | {' | '.join(['---:'] * len(COLUMNS))} |"
            assert none.startswith("| none | 2.000 | 7.39 | 1.000 |") and lbl.startswith(
                "| lbl:scope=micro_batch | 2.100 |"
            )
            tools.get_by_text("LaTeX").click()
            wait_until(page, "() => navigator.clipboard.readText().then((text) => text.includes('tabular'))")
            latex = page.evaluate("navigator.clipboard.readText()")
            assert (
                "\\toprule\nStrategy & Loss, nats & Perplexity" in latex
                and "lbl:scope=micro\\_batch & 2.100 &" in latex
            )

    def test_latex_takes_every_name_for_text(self, tmp_path):
        name = "a{b}$c$ 5%_\\x"
        make_run(tmp_path / "a", name, load={name: EVEN["prose"], "code": EVEN["code"]})
        with browser_page(write_report(tmp_path), permissions=["clipboard-read", "clipboard-write"]) as page:
            page.locator(".tools[data-table='domains-table']").get_by_text("LaTeX").click()
            wait_until(page, "() => navigator.clipboard.readText().then((text) => text.includes('tabular'))")
            latex = page.evaluate("navigator.clipboard.readText()")
            assert "\nStrategy & a\\{b\\}\\$c\\$ 5\\%\\_\\textbackslash{}x & code \\\\\n" in latex

    def test_a_live_page_keeps_what_the_reader_chose(self, tmp_path):
        make_pair(tmp_path)
        path = write_page(tmp_path, read_records(tmp_path), Live(1000, "12:00:00", "step 10 of 10."))
        shown = """() => [
            document.getElementById('at').value, document.querySelector('input[name=layer]:checked').value,
            document.getElementById('sort').value, document.querySelector('.shown-step').textContent,
            [...document.querySelectorAll('button[data-strategy]')].map((b) => b.getAttribute('aria-pressed')).join(),
            document.getElementById('plot-loss').data.map((trace) => trace.visible).join(),
        ]"""
        with browser_page(path) as page:
            assert page.evaluate(shown)[:3] == ["2", "1", "domain"]
            page.locator("#at").fill("1")
            page.locator(".chips label").first.click()
            page.locator("#sort").select_option("load")
            page.locator("button[data-strategy='1']").click()
            chosen = page.evaluate(shown)
            assert chosen[:3] == ["1", "0", "load"] and chosen[4:] == ["true,false", "true,false"]
            page.reload()
            page.wait_for_selector("html[data-ready]", timeout=60_000)
            assert page.evaluate(shown) == chosen

    def test_the_contents_stay_and_lead_to_every_section(self, tmp_path):
        with browser_page(make_pair(tmp_path), viewport={"width": 390, "height": 800}) as page:
            links = page.locator(".contents a")
            ids = [link.get_attribute("href") for link in links.all()]
            assert ids == [
                f"#{id}"
                for id in page.evaluate("[...document.querySelectorAll('h2[id^=h-]')].map((h) => h.id)")
                if id != "h-problems"
            ]
            links.nth(3).click()
            wait_until(page, f"() => document.querySelector('.contents a[aria-current]').hash === '{ids[3]}'")
            assert page.locator(".contents").bounding_box()["y"] == 0
            heading = page.locator(ids[3]).bounding_box()["y"]
            assert page.locator(".contents").bounding_box()["height"] <= heading < 200

    def test_the_table_of_experts_is_the_one_without_scripts(self, tmp_path):
        run = make_run(tmp_path / "a", "lbl", load=SPLIT)
        write_json(run.path / "audit.json", make_audit(SPLIT))
        path = write_report(tmp_path)
        rows = (
            "[...document.getElementById('experts-table').rows].map((row) => [...row.cells].map((c) => c.textContent))"
        )
        with browser_page(path) as page:
            drawn = page.evaluate(rows)
        with browser_page(path, java_script_enabled=False) as page:
            assert page.locator("#experts-table tr").count() == len(drawn) == 5
            assert [row.locator("th, td").all_inner_texts() for row in page.locator("#experts-table tr").all()] == drawn

    def test_without_scripts_there_are_tables_and_still_pictures(self, tmp_path):
        with browser_page(make_pair(tmp_path), java_script_enabled=False) as page:
            stills = page.locator("img.still").all()
            assert len(stills) == 7  # loss, MaxVio, bias, load over time, cost, and the experts of two runs
            assert all(still.is_visible() and still.evaluate("(image) => image.naturalWidth") > 300 for still in stills)
            assert not page.locator(".plot, .tools, .controls").filter(visible=True).count()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_no_serious_fault(self, tmp_path, scheme):
        axe = Path(__file__).parents[3] / "build" / "node_modules" / "axe-core" / "axe.min.js"
        if not axe.is_file():
            pytest.skip("needs axe-core: npm install --prefix build axe-core")
        make_run(tmp_path / "a" / "x", "none", notes=["a note"])
        make_run(tmp_path / "a" / "y", "lbl", load=SPLIT)
        (tmp_path / "b").mkdir()
        write_json(tmp_path / "b" / "audit.json", make_audit(SPLIT) | {"words": ["layer 1: collapsed"]})
        for folder in (tmp_path / "a", tmp_path / "b"):
            with browser_page(write_report(folder), color_scheme=scheme) as page:
                page.evaluate(axe.read_text())
                violations = page.evaluate("axe.run()")["violations"]
            faults = [(f["id"], f["nodes"][0]["html"]) for f in violations if f["impact"] in ("serious", "critical")]
            assert faults == []

    def test_an_audit_draws(self, tmp_path):
        write_json(tmp_path / "audit.json", make_audit(SPLIT))
        with browser_page(write_report(tmp_path), viewport={"width": 390, "height": 900}) as page:
            assert page.locator("#experts-table thead th").all_inner_texts() == [
                "Expert", "Load, × even", "Top domain", "× even in it", "Often with", "Typical tokens",
            ]  # fmt: skip
            assert page.locator("#plot-layers .scatterlayer path.js-line").count() == 4
            page.locator("#text").select_option("code")
            wait_until(page, "() => document.getElementById('all-0').data[0].z[0].join() === '2,2,0,0'")
            assert page.evaluate("document.documentElement.scrollWidth") == 390
