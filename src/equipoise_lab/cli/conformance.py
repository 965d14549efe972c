"""``equipoise conformance``."""

import difflib
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from equipoise.errors import UsageError
from equipoise_lab.cli.groups import with_joined_lines
from equipoise_lab.cli.process import exit_process, print_json, print_stderr, requires_lab, share_cores

if TYPE_CHECKING:
    from equipoise_lab.conformance import Verdict

__all__ = ["Conformance", "run", "subcommand"]

COLUMNS = ("scenario", "verdict", "answer", "right")


@dataclass(frozen=True)
class Conformance:
    """The options of ``equipoise conformance``."""

    framework: str | None  # None: list the scenarios
    scenarios: tuple[str, ...]  # empty: all
    json: bool


def subcommand() -> Any:
    import tyro

    @with_joined_lines
    def conformance(
        framework: Annotated[
            str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FRAMEWORK]", help_behavior_hint="")
        ] = None,
        scenarios: Annotated[
            tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SCENARIO ...]", help_behavior_hint="")
        ] = (),
        json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
    ) -> Conformance:
        """Does a framework balance its experts correctly? Asks the installed one the questions of the suite.

        Args:
            framework: equipoise, megatron, torchtitan, olmo_core, olmo_core_v2, automodel, litgpt, deepspeed, veomni,
                transformers, or the module:Class of a driver of your own. Exits with 1 if an answer is wrong. Without
                FRAMEWORK, all scenarios are listed.
            scenarios: Only these. One alone is shown with its question, and why its answer is right.
            json: Print JSON.
        """
        return Conformance(framework, scenarios, json)

    return Annotated[Conformance, tyro.conf.subcommand("conformance", constructor=conformance)]


def run(options: Conformance, command_line: str) -> None:
    share_cores()
    with requires_lab("conformance"):
        from equipoise_lab.conformance.scenarios import SCENARIOS
        from equipoise_lab.train.watch import print_rows
    for name in options.scenarios:
        if name not in SCENARIOS:
            near = difflib.get_close_matches(name, SCENARIOS, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            listed = f"the {len(SCENARIOS)} that `equipoise conformance` lists"
            raise UsageError(f"a scenario must be one of {listed}: got {name!r}.{hint}")
    if options.framework is None:
        _list_scenarios(options.json)
        return
    verdicts = _ask(options.framework, options.scenarios or tuple(SCENARIOS))
    if options.json:
        print_json([verdict.as_json() for verdict in verdicts])
    elif len(verdicts) == 1:
        print(_details(verdicts[0]))
    else:
        print(f"{verdicts[0].framework} {verdicts[0].version}")
        print_rows(COLUMNS, map(_row, verdicts), stderr=False)
        kinds = Counter(verdict.kind for verdict in verdicts)
        print_stderr(", ".join(f"{number} {kind}" for kind, number in kinds.items()))
    if any(verdict.kind == "wrong" for verdict in verdicts):
        exit_process(1)


def _list_scenarios(json: bool) -> None:
    from equipoise_lab.conformance.scenarios import SCENARIOS
    from equipoise_lab.train.watch import print_rows

    if json:
        print_json(
            [
                {
                    "name": s.name,
                    "area": s.area,
                    "question": s.question,
                    "why": s.why,
                    "defects": s.defects,
                    "ranks": s.ranks,
                }
                for s in SCENARIOS.values()
            ]
        )
        return
    print_rows(("scenario", "question"), [(s.name, s.question) for s in SCENARIOS.values()], stderr=False)
    print_stderr(
        f"{len(SCENARIOS)} scenarios. `equipoise conformance FRAMEWORK` asks all of them, `equipoise conformance "
        "FRAMEWORK SCENARIO` one."
    )


def _ask(framework: str, names: tuple[str, ...]) -> "list[Verdict]":
    """The verdicts. A bar on stderr shows how many are there, and how many of them are wrong."""
    from rich.console import Console
    from rich.progress import Progress

    from equipoise_lab.conformance import run

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(framework, total=len(names))
        num_wrong = 0

        def show(verdict: "Verdict") -> None:
            nonlocal num_wrong
            num_wrong += verdict.kind == "wrong"
            progress.update(task, advance=1, description=f"{framework}, {num_wrong} wrong")

        return run(framework, names, show)


def _row(verdict: "Verdict") -> tuple[str, ...]:
    return verdict.scenario, verdict.kind, verdict.got, verdict.right if verdict.kind == "wrong" else ""


def _details(verdict: "Verdict") -> str:
    from equipoise_lab.conformance.places import places_of
    from equipoise_lab.conformance.scenarios import SCENARIOS

    scenario = SCENARIOS[verdict.scenario]
    lines = [
        f"{scenario.name}: {scenario.question}",
        f"framework: {verdict.framework} {verdict.version}, on {scenario.ranks} rank{'s' * (scenario.ranks > 1)}",
        f"verdict:   {verdict.kind}",
        f"right:     {verdict.right}" if verdict.right else "",
        f"got:       {verdict.got}",
        f"why:       {scenario.why}",
    ]
    place = places_of(verdict.framework).get(scenario.name)
    if place is not None and verdict.kind == "wrong":
        lines += [f"where:     {place.file}", f"thread:    {place.thread}" if place.thread else "", place.note]
    return "\n".join(line for line in lines if line)
