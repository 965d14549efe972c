"""The docs are consistent: links, names of tests, known defects, metrics."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from handbook import as_page, navigation
from models import VOCAB, tiny_lm

import equipoise
from equipoise import metrics, parse_strategy
from equipoise_lab.analysis.summary import COLUMNS
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.trackers import evaluation_metrics, layer_metrics, result_metrics, step_metrics

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|[^|]*\|$", re.MULTILINE)
TEST_NAME = re.compile(r"`([\w/]+\.py)::(\w+)`")


def _defects() -> list[tuple[str, ...]]:
    return ROW.findall((DOCS / "evidence" / "known_defects.md").read_text())


def test_every_page_is_once_in_the_navigation():
    pages = [*PAGES, *DOCS.rglob("*.ipynb")]
    assert sorted(navigation()) == sorted(page.relative_to(DOCS).with_suffix(".md").as_posix() for page in pages)


def test_a_page_of_the_site_links_to_pages_and_names_other_files():
    fence = "```sh\n[c](d)\n```"
    text = "[Tour](tour.ipynb#a), ![p](p.png) [code](../src/a.py), [`src/b.py`](../src/b.py)\n<!-- setup\nx\n-->\n"
    expected = "[Tour](tour.md#a), ![p](p.png) code (`src/a.py`), `src/b.py`\n"
    assert as_page(text + fence, DOCS) == expected + fence


def test_commands_examples_and_the_readme_take_the_strategies_that_the_page_advises():
    page, readme = ((TESTS.parent / name).read_text() for name in ("docs/which_strategy.md", "README.md"))
    advised = set(re.findall(r"`([^`]+)`", page))
    rows = re.search(r"## Which strategy\?\n(.*?)\n\n\[", readme, re.DOTALL)[1]
    of_readme = {name for name in re.findall(r"`([^`]+)`", rows) if name != "frozen+"}
    assert of_readme and of_readme <= advised
    assert Train(out=Path("run")).strategy in advised  # a short run
    compare = Compare(out=Path("runs"))
    (rate,) = [parse_strategy(name)[0].rate for name in compare.strategies if name.startswith("loss-free")]
    assert rate == pytest.approx(1 / compare.steps, rel=0.25)
    for example in (TESTS.parent / "examples").glob("finetune_*.py"):
        assert '"lbl:scope=global_batch,coefficient=1e-2"' in example.read_text(), example
    for strategy in {name for name in advised if name.startswith(("lbl:", "loss-free:", "frozen+l"))}:
        parse_strategy(strategy)


def test_known_defects_are_numbered_without_a_gap():
    assert [int(number) for number, *_ in _defects()] == list(range(1, 126))


def test_every_known_defect_names_a_test_or_a_reason():
    for number, mistake, rule, evidence in _defects():
        assert mistake.strip() and rule.strip(), number
        labels = [label for label in ("cannot occur: ", "open: ") if label in evidence]
        assert TEST_NAME.search(evidence) or labels, f"known defect {number} names neither a test nor a reason"
        assert evidence.count("several ranks: ") <= 1
        for label in labels:
            assert evidence.split(label)[1].split(";")[0].strip(), f"known defect {number} gives no reason: {evidence}"


def test_tests_named_on_a_page_exist():
    functions: dict[str, set[str]] = {}
    for page in PAGES:
        text = page.read_text()
        assert text.count(".py::") == len(TEST_NAME.findall(text)), (
            f"{page.name} names a test in another form than `file.py::function`"
        )
        for file, function in TEST_NAME.findall(text):
            path = TESTS / file
            assert path.exists(), f"{page.name} names {file}, which does not exist"
            if file not in functions:
                tree = ast.parse(path.read_text())
                functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in functions[file], f"{page.name} names {file}::{function}, which does not exist"
            assert function.startswith("test_"), function
    assert sum(map(len, functions.values())) > 100, "too few names of tests were found: check TEST_NAME"


def test_a_defects_row_and_its_tests_name_each_other():
    """The docstring of a test lists its known defects. Exactly these rows name the test."""
    rows = [
        (int(number), {function for _, function in TEST_NAME.findall(evidence)})
        for number, _, _, evidence in _defects()
    ]
    for node in ast.parse((TESTS / "library" / "test_known_defects.py").read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            match = re.match(r"Known defects? ([\d, ]+):", ast.get_docstring(node) or "")
            assert match, f"the docstring of {node.name} must begin with the numbers of its known defects"
            in_docstring = [int(number) for number in match.group(1).split(",")]
            assert in_docstring == [number for number, functions in rows if node.name in functions], node.name


def _anchors(page: Path) -> Counter[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return Counter(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())
def test_links_to_files_and_headings_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {link}, which does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{page.name} links to {link}, which does not exist"


def test_the_page_of_metrics_has_every_metric_and_every_key():
    words = set(re.findall(r"`(\w+)`", (DOCS / "reference" / "metrics.md").read_text()))
    assert set(metrics.__all__) <= words, set(metrics.__all__) - words
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free+lbl+lbl:scope=micro_batch+z")
    ids = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    (model(ids) + balance.loss()).backward()
    balance.step()
    keys = set(balance.metrics())
    assert {"load_balancing_loss", "load_balancing_loss_micro_batch", "z_loss", "bias_max", "maxvio_batch"} <= keys
    assert keys <= words, keys - words


def test_the_page_of_names_has_the_title_of_each_column_and_the_prefix_of_each_key_of_a_tracker():
    page = (DOCS / "reference" / "metric_names.md").read_text()
    rows = [f"| `{column.key}` | {column.title} | `result/{column.key}` |" for column in COLUMNS]
    assert "\n".join(rows) in page
    keys = [
        *step_metrics({"step": 1, "loss": 1.0, "maxvio_batch": 1.0}, 9.0, 0),
        *evaluation_metrics({"split": "selection", "maxvio_global": 1.0}),
        *result_metrics({column.key: 1.0 for column in COLUMNS}),
        *layer_metrics(["layers.3"], [[1, 1]], most=1),
    ]
    prefixes = set(re.findall(r"^\| .+ \| `(\w+/)` \| `\1[\w/]+` \|$", page, re.MULTILINE))
    assert {key.partition("/")[0] + "/" for key in keys} == prefixes - {"balance/"}
    examples = re.findall(r"^\| .+ \| `\w+/` \| `([\w/]+)` \|$", page, re.MULTILINE)
    assert {example for example in examples if not example.startswith("balance/")} <= set(keys)
