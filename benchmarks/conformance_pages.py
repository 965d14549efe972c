"""The pages of the conformance suite, conformance.md and conformance_answers.md, and a column of known_defects.md."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from page_parts import format_versions, table

from equipoise_lab.conformance.places import places_of
from equipoise_lab.conformance.runner import FRAMEWORKS
from equipoise_lab.conformance.scenarios import SCENARIOS

__all__ = ["check_pages", "write_pages"]

DOCS = Path(__file__).parent.parent / "docs"
DEFECTS = DOCS / "evidence" / "known_defects.md"
TABLE, ANSWERS = DOCS / "evidence" / "conformance.md", DOCS / "evidence" / "conformance_answers.md"
REPRODUCTIONS = DOCS / "evidence" / "reproductions"
TITLES = {
    "equipoise": "equipoise", "megatron": "Megatron-Core", "torchtitan": "torchtitan", "olmo_core": "OLMo-core",
    "olmo_core_v2": "OLMo-core V2", "automodel": "Automodel", "litgpt": "litgpt", "deepspeed": "DeepSpeed",
    "veomni": "VeOmni", "transformers": "Transformers",
}  # fmt: skip
SIGNS = {"right": "yes", "refuses": "refuses", "does not have it": "–", "not tried": "?"}
Answers = Mapping[str, Mapping[str, Mapping[str, Any]]]


class _Release(NamedTuple):
    framework: str
    version: str
    verdicts: dict[str, dict[str, Any]]  # by scenario


def write_pages(stored: Mapping[str, Any]) -> None:
    for page, text in _pages(stored).items():
        page.write_text(text, encoding="utf-8")


def check_pages(stored: Mapping[str, Any]) -> str | None:
    """What is wrong, or None."""
    stale = [page.name for page, text in _pages(stored).items() if page.read_text(encoding="utf-8") != text]
    return f"{', '.join(stale)}: out of date. Run: python benchmarks/conformance.py --page" if stale else None


def _pages(stored: Mapping[str, Any]) -> dict[Path, str]:
    releases = [
        [
            _Release(name, version, {verdict["scenario"]: verdict for verdict in verdicts})
            for version, verdicts in stored["answers"][name].items()
        ]
        for name in FRAMEWORKS
        if name in stored["answers"]
    ]
    parts = {"the table": "\n".join(_table(releases)), "source": _source(stored), "numbers": _numbers(releases)}
    defects = DEFECTS.read_text(encoding="utf-8")
    details = {"answers": "\n".join(line for of in releases if of[0].framework != "equipoise" for line in _details(of))}
    pages = {page: _filled(page, content) for page, content in ((TABLE, parts), (ANSWERS, details))}
    return {**pages, DEFECTS: _with_answers(defects, releases)}


def _filled(page: Path, parts: Mapping[str, str]) -> str:
    text = page.read_text(encoding="utf-8")
    for name, content in parts.items():
        start, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, after = text.split(start)[0], text.split(end)[1]
        text = f"{before}{start}\n\n{content.strip()}\n\n{end}{after}"
    return text


def _source(stored: Mapping[str, Any]) -> str:
    facts, minutes = stored["facts"], sum(stored["seconds"].values()) / 60
    return (
        f"`{facts['command']}`, {facts['hardware']}, {facts['date']}, {format_versions(facts)}; "
        f"{minutes:.0f} minutes for all frameworks and releases."
    )


def _numbers(releases: Sequence[Sequence[_Release]]) -> str:
    rows = []
    for newest, *before in releases:
        kinds = [verdict["kind"] for verdict in newest.verdicts.values()]
        counts = (str(kinds.count(k)) for k in ("right", "wrong", "refuses", "does not have it", "not tried"))
        versions = f"{newest.version}, {', '.join(release.version for release in before)}".removesuffix(", ")
        rows.append((TITLES[newest.framework], versions, *counts))
    head = ("framework", "releases", "right", "wrong", "refuses", "lacks it", "not tried")
    return "\n".join(table(head, rows))


def _table(releases: Sequence[Sequence[_Release]]) -> Iterator[str]:
    """By area, the scenarios and the newest release of each framework."""
    newest = [of[0] for of in releases]
    for area in dict.fromkeys(scenario.area for scenario in SCENARIOS.values()):
        yield f"### {area[0].upper()}{area[1:]}"
        yield ""
        rows = [
            (scenario.question, *(_cell(release, scenario.name) for release in newest))
            for scenario in SCENARIOS.values()
            if scenario.area == area
        ]
        yield from table(("question", *(TITLES[release.framework] for release in newest)), rows)


def _cell(release: _Release, scenario: str) -> str:
    verdict = release.verdicts.get(scenario)
    if verdict is None:
        return "?"
    if verdict["kind"] != "wrong":
        return SIGNS[verdict["kind"]]
    return f"[**{_short(verdict['got'])}**](conformance_answers.md#{_anchor(release.framework)})"


def _short(got: str) -> str:
    """A wrong answer in a few characters."""
    strength = re.match(r"strength ([-\d.naif]+), (direction exact|distance ([\d.e+naif]+))", got)
    if strength:
        return f"×{float(strength[1]):.3g}" if strength[3] is None else f"off {float(strength[3]):.2g}"
    if got.startswith("["):
        return "other"
    if re.match(r"\w+(Error|Exception):", got):
        return "error"
    if got.startswith("layers by"):
        return "a layer stays"
    return re.split("[,:]", got)[0][:9]


def _anchor(framework: str) -> str:
    return re.sub(r"[^a-z0-9-]", "", TITLES[framework].lower().replace(" ", "-"))


def _details(of: Sequence[_Release]) -> Iterator[str]:
    newest, *before = of
    framework, places = newest.framework, places_of(newest.framework)
    yield f"## {TITLES[framework]}"
    yield ""
    yield f"Release {newest.version}. `equipoise conformance {framework} SCENARIO` asks again."
    yield ""
    wrong = [verdict for verdict in newest.verdicts.values() if verdict["kind"] == "wrong"]
    rows = []
    for verdict in wrong:
        place = places.get(verdict["scenario"])
        thread = f" {_link(place.thread)}" if place and place.thread else ""
        script = REPRODUCTIONS / framework / f"{verdict['scenario'].replace('-', '_')}.py"
        name = f"`{verdict['scenario']}`"
        linked = f"[{name}](reproductions/{framework}/{script.name})" if script.exists() else name
        where = f"`{place.file}`{thread}. {place.note}" if place else ""
        rows.append((linked, verdict["right"] or "no error", verdict["got"], where))
    if rows:
        yield from table(("wrong", "right answer", "its answer", "where, and why"), rows)
    for kind, words in (("refuses", "Refuses"), ("not tried", "Not tried")):
        of_kind = [v for v in newest.verdicts.values() if v["kind"] == kind]
        if of_kind:
            yield f"{words}: " + "; ".join(f"`{v['scenario']}` ({v['got'].rstrip('.')})" for v in of_kind) + "."
            yield ""
    lacking = sorted({v["got"] for v in newest.verdicts.values() if v["kind"] == "does not have it"})
    if lacking:
        yield "Does not have: " + "; ".join(lacking) + "."
        yield ""
    for release in before:
        changes = list(_changes(newest, release))
        words = "; ".join(changes) if changes else "the same answers"
        yield f"Release {release.version}: {words}."
        yield ""


def _changes(newest: _Release, before: _Release) -> Iterator[str]:
    for name, verdict in newest.verdicts.items():
        earlier = before.verdicts.get(name)
        if earlier is not None and earlier["kind"] != verdict["kind"]:
            figure = f" ({earlier['got']})" if earlier["kind"] == "wrong" else ""
            yield f"`{name}`: {earlier['kind']}{figure}, now {verdict['kind']}"


def _link(thread: str) -> str:
    repository, number = thread.split("#")
    return f"[{thread}](https://github.com/{repository}/issues/{number})"


def _with_answers(text: str, releases: Sequence[Sequence[_Release]]) -> str:
    """The page of known defects with its last column: who is asked about a defect, and whose answer is wrong today."""
    lines = []
    for line in text.splitlines():
        row = re.match(r"\| (\d+) \|", line)
        if row is not None:
            before = "|".join(re.split(r"(?<!\\)\|", line)[:5])
            line = f"{before}| {_of_defect(int(row[1]), releases)} |"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _of_defect(number: int, releases: Sequence[Sequence[_Release]]) -> str:
    return "; ".join(
        f"`{scenario.name}`{_who_is_wrong(scenario.name, releases)}"
        for scenario in SCENARIOS.values()
        if number in scenario.defects
    )


def _who_is_wrong(scenario: str, releases: Sequence[Sequence[_Release]]) -> str:
    names: dict[str, list[str]] = {"wrong": [], "mended": [], "right": []}
    for newest, *before in releases:
        kind = newest.verdicts[scenario]["kind"]
        if newest.framework == "equipoise" or kind not in names:
            continue
        was_wrong = any(release.verdicts[scenario]["kind"] == "wrong" for release in before)
        if kind == "right" and was_wrong:
            names["mended"].append(f"{TITLES[newest.framework]} {newest.version}")
        else:
            names[kind].append(TITLES[newest.framework])
    parts = [f"{kind}: {', '.join(frameworks)}" for kind, frameworks in names.items() if frameworks]
    return f" ({'; '.join(parts)})" if parts else ""
