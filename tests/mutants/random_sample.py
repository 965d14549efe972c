"""``python -m mutants.random_sample``: breaks the core at random places; the tests that reach a line must notice.

The operators are those of cosmic-ray. Every place of the core has the same chance, then every kind of mutation there;
annotations have none, since they change no behaviour. The sample follows from the seed and the source.

    1. The tests run once under coverage, which records the tests that reach each line. Of a line that runs on import
       or on a spawned rank it cannot tell the test: there all tests of the file, and all that spawn ranks, are taken.
    2. For each mutation they run on a copy of the repository, the quickest first, until one fails.

The result is in ``--out``: ``coverage.json``, and ``mutations.json`` with the verdict and the diff of each mutation. A
run that was stopped goes on where it was. Mutations that change no behaviour are listed in ``equivalent.toml`` with a
reason and are not run.

This module never imports the source that it mutates. It is a plugin of pytest too, in the first step.
"""

import argparse
import ast
import difflib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from mutants.mutant import ROOT, copy_repository

CORE = "src/equipoise"
OUTSIDE = ("integrations", "testing")  # folders of the package that are not the core
TESTS = ("tests/library", "tests/distributed", CORE)
EQUIVALENT = Path(__file__).with_name("equivalent.toml")
REPORTS_VARIABLE = "EQUIPOISE_REPORTS"
NOT_RUN = "pytest did not run"
STARTS_RANKS = r"run_on_ranks|torchrun|subprocess"
STAGES = (12, 60, 400)  # tests of the first, second and third call of pytest: most mutations die in the first
SLOWER = 5.0  # a mutation that makes tests so many times slower hangs
START_SECONDS = 90.0  # for imports, on a busy machine


class Mutation(NamedTuple):
    path: str  # in the repository
    line: int
    operator: str
    occurrence: int  # of the operator in the file

    @property
    def key(self) -> str:
        return f"{self.path}:{self.line} {self.operator}#{self.occurrence}"


# ---- 1. which tests reach which line: hooks of pytest ----


def pytest_runtest_logstart(nodeid: str) -> None:
    """The test is the context of coverage. Processes that it starts have none."""
    coverage = sys.modules.get("coverage")
    if REPORTS_VARIABLE in os.environ and coverage is not None and coverage.Coverage.current() is not None:
        coverage.Coverage.current().switch_context(_name(nodeid))


def pytest_runtest_logreport(report: Any) -> None:
    if REPORTS_VARIABLE in os.environ and (report.when == "call" or report.failed):
        with open(Path(os.environ[REPORTS_VARIABLE]) / f"{os.getpid()}.jsonl", "a", encoding="utf-8") as file:
            print(json.dumps([_name(report.nodeid), report.duration, report.outcome]), file=file)


def _name(nodeid: str) -> str:
    """xdist adds the group to the name of a test that has one."""
    return re.sub(r"@[\w.-]+$", "", nodeid)


def _read_reports(folder: Path) -> list[tuple[str, float, str]]:
    """Name, seconds and outcome of each test that ran."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text(encoding="utf-8").splitlines()]
    return [(name, seconds, outcome) for name, seconds, outcome in map(json.loads, lines)]


def record_coverage(out: Path, workers: int, tests: list[str]) -> dict[str, Any]:
    """``seconds`` of each passed test; ``lines``: by file and line the tests that reach it, "" for no test that is known;
    ``ranks``: the tests of files that start other processes."""
    import coverage

    with tempfile.TemporaryDirectory() as name:
        root, reports = Path(name) / "repository", Path(name) / "reports"
        copy_repository(root)
        reports.mkdir()
        settings = root / "coverage.ini"
        settings.write_text(
            f"[run]\nsource = {root / CORE}\nparallel = true\nsigterm = true\ndata_file = {reports / 'data'}\n"
            f"concurrency = multiprocessing,thread\npatch = subprocess\n"
        )
        command = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", "-m", "pytest", "-q"]
        command += [
            "-p",
            "mutants.random_sample",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::coverage.exceptions.CoverageWarning",
        ]
        command += ["-n", str(workers) if workers > 1 else "0", "--dist", "loadgroup", *tests]
        with open(out / "coverage.log", "w", encoding="utf-8") as log:
            subprocess.run(
                command, cwd=root, env=_environment(root) | {REPORTS_VARIABLE: str(reports)}, stdout=log, stderr=log
            )
        combined = coverage.Coverage(data_file=str(reports / "data"), config_file=False)
        combined.combine([str(reports)])
        seconds = {test: duration for test, duration, outcome in _read_reports(reports) if outcome == "passed"}
        data, lines = combined.get_data(), {}
        for path in map(Path, data.measured_files()):
            contexts = data.contexts_by_lineno(str(path))
            lines[str(path.relative_to(root))] = {
                str(line): sorted(test for test in tests if test in seconds or not test)
                for line, tests in contexts.items()
            }
        files = {test.partition("::")[0] for test in seconds}
        starts = {name for name in files if re.search(STARTS_RANKS, (root / name).read_text(encoding="utf-8"))}
    return {
        "seconds": seconds,
        "lines": lines,
        "ranks": [test for test in seconds if test.partition("::")[0] in starts],
    }


def tests_of(mutation: Mutation, coverage: dict[str, Any]) -> list[str]:
    """The tests that reach the line, then those that may."""
    in_file = coverage["lines"].get(mutation.path, {})
    contexts = in_file.get(str(mutation.line), [""])
    tests = [test for test in contexts if test]
    if not tests:
        tests = sorted({test for line in in_file.values() for test in line if test})
    return list(dict.fromkeys(tests + coverage["ranks"] * ("" in contexts)))


def _environment(root: Path) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{root / 'src'}:{root / 'tests'}", "OMP_NUM_THREADS": "1"}


# ---- 2. the sample ----


def core_files(root: Path = ROOT) -> list[Path]:
    files = sorted((root / CORE).rglob("*.py"))
    return [file for file in files if file.relative_to(root / CORE).parts[0] not in OUTSIDE]


def _annotations(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations, overloads and aliases of types stand: (line, column) from and to."""
    spans = []
    for node in ast.walk(ast.parse(source)):
        parts = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.FunctionDef) and any("overload" in ast.unparse(d) for d in node.decorator_list):
            parts.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            parts.append(node)
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(
            ("Int[", "Float[", "Bool[", "Callable[")
        ):
            parts.append(node)
        for part in filter(None, parts):
            spans.append(((part.lineno, part.col_offset), (part.end_lineno or 0, part.end_col_offset or 0)))
    return spans


def places(root: Path = ROOT) -> dict[tuple[str, tuple[int, int], str], list[Mutation]]:
    """The mutations of each place: its file, its position, and the family of the operator."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    operators = [(name, get_operator(name)) for name in operator_names()]
    found: dict[tuple[str, tuple[int, int], str], list[Mutation]] = defaultdict(list)
    for file in core_files(root):
        source, path = file.read_text(encoding="utf-8"), str(file.relative_to(root))
        spans, nodes = _annotations(source), list(ast_nodes(get_ast(source)))
        for name, operator in operators:
            if operator.arguments():
                continue  # operators that need names of variables
            positions = (start for node in nodes for start, _ in operator().mutation_positions(node))
            for occurrence, start in enumerate(positions):
                if not any(first <= start < last for first, last in spans):
                    family = name.split("/")[1].split("_")[0]
                    found[path, start, family].append(Mutation(path, start[0], name, occurrence))
    return found


def sample(number: int, seed: int, root: Path = ROOT) -> list[Mutation]:
    every, generator = places(root), random.Random(seed)
    order = sorted(every)
    return [generator.choice(every[place]) for place in generator.sample(order, min(number, len(order)))]


def mutate(mutation: Mutation, source: str) -> str:
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    return mutate_code(source, get_operator(mutation.operator)(), mutation.occurrence) or source


def diff(source: str, mutated: str) -> str:
    lines = difflib.unified_diff(source.splitlines(), mutated.splitlines(), lineterm="", n=2)
    return "\n".join(list(lines)[2:])


def reason_of_equivalence(mutation: Mutation, change: str) -> str | None:
    listed = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")).get("mutation", [])
    minus = "\n".join(line[1:].strip() for line in change.splitlines() if line.startswith("-"))
    plus = "\n".join(line[1:].strip() for line in change.splitlines() if line.startswith("+"))
    for entry in listed:
        if (entry["path"], entry["original"], entry["mutated"]) == (mutation.path, minus, plus):
            return entry["reason"]
    return None


# ---- 3. the verdicts ----


def _stages(tests: list[str], seconds: dict[str, float], ranks: set[str]) -> Iterator[list[str]]:
    """The quickest tests first. Tests that take less than a tenth of a second are equally quick: their order is random
    by a fixed seed, so that the first stage is of many files. Tests that start processes come last: those of a file
    share what the first one has started, so their seconds do not show what one alone takes."""
    order = sorted(tests)
    random.Random(0).shuffle(order)
    order.sort(key=lambda test: max(0.1, round(seconds[test], 1)))
    for in_stages, sizes in (([t for t in order if t not in ranks], STAGES), ([t for t in order if t in ranks], (60,))):
        start = 0
        for size in sizes:
            if in_stages[start : start + size]:
                yield in_stages[start : start + size]
            start += size


def judge(mutation: Mutation, coverage: dict[str, Any], root: Path, limit: float) -> dict[str, Any]:
    """Runs in ``root``, a copy of the repository, and leaves it as it was."""
    started, file = time.time(), root / mutation.path
    source = file.read_text(encoding="utf-8")
    mutated = mutate(mutation, source)
    result: dict[str, Any] = {**mutation._asdict(), "diff": diff(source, mutated)}
    tests = tests_of(mutation, coverage)
    reason = reason_of_equivalence(mutation, result["diff"])
    if reason is not None or mutated == source:
        return result | {"verdict": "equivalent", "reason": reason or "the same source"}
    if not tests:
        return result | {"verdict": "survived", "reason": "no test reaches the line", "tests": 0}
    file.write_text(mutated, encoding="utf-8")
    verdict, by, run = "survived", [], 0
    try:
        passed = [test for test in tests if test in coverage["seconds"]]
        for stage in _stages(passed, coverage["seconds"], set(coverage["ranks"])):
            if time.time() - started > limit:
                break
            expected = sum(coverage["seconds"][test] for test in stage)
            failed = run_tests(root, stage, min(limit, START_SECONDS + SLOWER * expected))
            run += len(stage)
            if failed is None:
                verdict = "hangs"
            elif failed:
                verdict, by = "seen", failed
            if verdict != "survived":
                break
    finally:
        file.write_text(source, encoding="utf-8")
    return result | {"verdict": verdict, "by": by, "tests": run, "of": len(tests), "seconds": time.time() - started}


def run_tests(root: Path, tests: list[str], limit: float | None, *, stop: bool = True) -> list[str] | None:
    """The tests that failed; ``NOT_RUN`` if pytest could not run them. None if they took longer than the limit."""
    with tempfile.TemporaryDirectory() as reports:
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
        process = subprocess.Popen(
            command + ["-x"] * stop + ["-p", "mutants.random_sample", *tests],
            cwd=root,
            env=_environment(root) | {REPORTS_VARIABLE: reports},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # ranks that a test started end with it
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
        failed = [test for test, _, outcome in _read_reports(Path(reports)) if outcome == "failed"]
        return failed or ([NOT_RUN] if process.returncode else [])


def tests_that_fail_anyway(results: list[dict[str, Any]], root: Path) -> set[str]:
    """Of the tests that noticed a mutation, those that fail without one. They would notice everything."""
    noticed = sorted({test for result in results for test in result.get("by") or []} - {NOT_RUN})
    return set(run_tests(root, noticed, None, stop=False) or []) - {NOT_RUN} if noticed else set()


def _write(path: Path, content: Any) -> None:
    partial = path.with_suffix(".part")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)  # a run that is stopped leaves the file whole


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mutants.random_sample", description=__doc__.split("\n")[0])
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "random_mutants")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one mutation")
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="tests that may notice a mutation")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    recorded, verdicts = options.out / "coverage.json", options.out / "mutations.json"
    if not recorded.is_file():
        _write(recorded, record_coverage(options.out, options.workers, options.tests))
    coverage = json.loads(recorded.read_text(encoding="utf-8"))
    results = {entry["key"]: entry for entry in json.loads(verdicts.read_text())} if verdicts.is_file() else {}
    chosen = sample(options.number, options.seed)
    with tempfile.TemporaryDirectory() as name:
        copies: SimpleQueue[Path] = SimpleQueue()
        for worker in range(options.workers):
            copy_repository(Path(name) / str(worker))
            copies.put(Path(name) / str(worker))

        def run(mutation: Mutation) -> dict[str, Any]:
            root = copies.get()
            try:
                return {"key": mutation.key, **judge(mutation, coverage, root, options.limit)}
            finally:
                copies.put(root)

        while remaining := [mutation for mutation in chosen if mutation.key not in results]:
            with ThreadPoolExecutor(options.workers) as pool:
                for result in pool.map(run, remaining):
                    results[result["key"]] = result
                    _write(verdicts, list(results.values()))
                    print(f"{result['verdict']:10} {result['key']}", flush=True)
            broken = tests_that_fail_anyway(list(results.values()), Path(name) / "0")
            if broken:
                print(f"these tests fail without a mutation and are left out: {', '.join(sorted(broken))}", flush=True)
                coverage["seconds"] = {t: s for t, s in coverage["seconds"].items() if t not in broken}
                results = {key: r for key, r in results.items() if not broken & set(r.get("by") or [])}
                _write(recorded, coverage)
                _write(verdicts, list(results.values()))
    ours = [results[mutation.key] for mutation in chosen]
    survivors = [result for result in ours if result["verdict"] == "survived"]
    for result in survivors:
        why = result.get("reason") or f"{result['tests']} of {result['of']} tests pass"
        print(f"\n{result['key']}: {why}")
        print(result["diff"])
    changing = [result for result in ours if result["verdict"] != "equivalent"]
    print(
        f"\n{len(changing) - len(survivors)} of {len(changing)} mutations seen; {len(ours) - len(changing)} change nothing"
    )
    sys.exit(len(survivors) > 0.02 * len(changing))


if __name__ == "__main__":
    main()
