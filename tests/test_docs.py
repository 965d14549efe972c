"""The pages say what is there: every known defect once, tests and files that exist, every metric."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from models import VOCAB, tiny_lm

import equipoise
from equipoise import metrics

TESTS = Path(__file__).parent
DOCS = TESTS.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))
ROW = re.compile(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", re.MULTILINE)
NAMED = re.compile(r"`([\w/]+\.py)::(\w+)`")


def _rows() -> list[tuple[str, ...]]:
    return ROW.findall((DOCS / "known_defects.md").read_text())


def test_every_known_defect_is_there_once_and_in_order():
    assert [int(number) for number, *_ in _rows()] == list(range(1, 98))


def test_every_known_defect_says_what_shows_its_rule():
    for number, wrong, rule, shown in _rows():
        assert wrong.strip() and rule.strip(), number
        says = [word for word in ("cannot occur: ", "open: ") if word in shown]
        assert NAMED.search(shown) or says, f"known defect {number} names neither a test nor a reason: {shown}"
        assert shown.count("several ranks: ") <= 1
        for word in says:
            assert shown.split(word)[1].split(";")[0].strip(), f"known defect {number} gives no reason: {shown}"


def test_every_test_that_a_page_names_exists():
    functions: dict[str, set[str]] = {}
    for page in PAGES:
        text = page.read_text()
        assert text.count(".py::") == len(NAMED.findall(text)), f"{page.name} names a test in another way"
        for file, function in NAMED.findall(text):
            path = TESTS / file
            assert path.exists(), f"{page.name} names {file}, which is not there"
            if file not in functions:
                tree = ast.parse(path.read_text())
                functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert function in functions[file], f"{page.name} names {file}::{function}, which is not there"
            assert function.startswith("test_"), function
    assert sum(map(len, functions.values())) > 100, "hardly a test was looked for: the test proves nothing"


def test_a_test_and_a_row_agree_on_what_the_test_is_for():
    """A test says in its docstring which known defects it is for; these rows name it, and no other."""
    rows = [(int(number), {function for _, function in NAMED.findall(shown)}) for number, _, _, shown in _rows()]
    for node in ast.parse((TESTS / "library" / "test_known_defects.py").read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            found = re.match(r"Known defects? ([\d, ]+):", ast.get_docstring(node) or "")
            assert found, f"{node.name} does not say which known defect it is for"
            said = [int(number) for number in found.group(1).split(",")]
            assert said == [number for number, functions in rows if node.name in functions], node.name


def _anchors(page: Path) -> Counter[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return Counter(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{page.name} links to {link}"


def test_every_metric_and_every_key_is_on_the_page_of_metrics():
    words = set(re.findall(r"`(\w+)`", (DOCS / "metrics.md").read_text()))
    assert set(metrics.__all__) <= words, set(metrics.__all__) - words
    model = tiny_lm()
    balance = equipoise.attach(model, "loss-free+lbl+lbl:scope=micro_batch+z")
    ids = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(0))
    (model(ids) + balance.loss()).backward()
    balance.step()
    keys = set(balance.metrics())
    assert {"load_balancing_loss", "load_balancing_loss_micro_batch", "z_loss", "bias_max", "maxvio_batch"} <= keys
    assert keys <= words, keys - words
