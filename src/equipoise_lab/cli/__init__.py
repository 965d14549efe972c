"""The command line, ``equipoise COMMAND``. Talk goes to stderr; stdout is for results.

Exit codes: 0 done; 1 something outside is not as it must be; 2 what was asked for cannot be; 130 stopped by the user.
"""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import equipoise
from equipoise.errors import EquipoiseError, UsageError
from equipoise.recipes import RECIPES, Recipe, recipe, split_strategy
from equipoise_lab.audit.config import Audit
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.train.config import Compare, Train
from equipoise_lab.train.stop import Told, told

if TYPE_CHECKING:
    from rich.console import Console

    from equipoise_lab.train.watch import Terminal

__all__ = ["main"]


@dataclass(frozen=True)
class Report:
    """Draw report.html again, from run folders or from an audit."""

    folder: Path
    """The folder that was passed as --out to compare, train or audit."""


@dataclass(frozen=True)
class Recipes:
    """Published settings by name: all of them, or one with the source of every value."""

    name: str
    json: bool


@dataclass(frozen=True)
class ExportCheck:
    """Whether the balancing bias of a saved model survived: dtype, collapsed values, tokens that bfloat16 reroutes."""

    checkpoint: Path
    json: bool


@dataclass(frozen=True)
class Families:
    """The model families that can be attached, or what becomes of one model."""

    model: Path | None
    json: bool


Asked = Compare | Train | Report | Recipes | Reproduce | Audit | ExportCheck | Families


def _parse(arguments: list[str]) -> Asked:
    try:
        import tyro
    except ImportError:
        raise EquipoiseError(
            "the command line needs more than torch: tyro is missing. Install it with: pip install 'equipoise[lab]'"
        ) from None

    def recipes(
        name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]", help_behavior_hint="")] = "",
        json: bool = False,
    ) -> Recipes:
        """Published settings by name: all of them, or one with the source of every value.

        Args:
            name: The recipe to show; without it, all.
            json: Print JSON.
        """
        return Recipes(name, json)

    def reproduce(
        claim: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[CLAIM]", help_behavior_hint="")] = "all",
        budget: float | None = None,
        out: Path = Path("runs/reproduce"),
        results: Path = Path("benchmarks/results/claims"),
        workers: int = 0,
        dtype: Literal["bfloat16", "float32"] | None = None,
        page: Path | None = None,
        json: bool = False,
    ) -> Reproduce:
        """Test what the papers claim, with paired seeds, at the size of a laptop.

        Args:
            claim: The claim to test, as 1-scope; without it, all. --budget 0 lists them.
            budget: Minutes. No run is begun that is not expected to end within them; the same command goes on later. 0
                runs nothing and says what the results say.
            out: Folder of the runs under way.
            results: Folder of the results, one small file a run. What is there is not run again; a new
                folder runs all of it.
            workers: Runs side by side, one thread each; 0: as many as there are cores.
            dtype: Precision of all runs, in place of what the claims name; its results stand beside the others. CPUs
                without bfloat16 instructions are several times as quick in float32.
            page: Write a page in Markdown with all claims.
            json: Print the verdicts as JSON on stdout.
        """
        return Reproduce(claim, budget, out, results, workers, dtype, page, json)

    def audit(
        model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help_behavior_hint="")],
        data: str = "corpus",
        tokens: int = 100_000,
        out: Path = Path("runs/audit"),
        sequence_length: int | None = None,
        batch: int = 8,
        json: bool = False,
    ) -> Audit:
        """What the experts of a saved model do on text: balance by layer, specialisation by domain and token.

        Args:
            model: Folder of a Transformers model with its tokenizer, or of a run of `equipoise train`.
            data: Text by domain, as in `equipoise train --data`.
            tokens: Tokens in all, shared evenly by the domains.
            out: Folder for audit.json and report.html.
            sequence_length: Tokens a row; without it 512, or what the model was made for where that is less.
            batch: Rows of a forward.
            json: Print audit.json on stdout too.
        """
        return Audit(model, data, tokens, out, sequence_length, batch, json)

    def export_check(
        checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(help_behavior_hint="")],
        json: bool = False,
    ) -> ExportCheck:
        """Does a saved model still hold the balancing bias that it was trained with?

        Args:
            checkpoint: Folder of a Transformers model, or of a run. Ends with 1 if a bias is lost; one of zeros counts
                as held, and a note says that it was never moved, or lost before. In the table, "distinct" is how many
                different values a bias has, as it is saved and "in bfloat16"; "rerouted by bfloat16" the share of
                random tokens that would choose other experts if an engine rounded it so, as it is and "less its mean".
            json: Print JSON.
        """
        return ExportCheck(checkpoint, json)

    def families(
        model: Annotated[
            Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]", help_behavior_hint="")
        ] = None,
        json: bool = False,
    ) -> Families:
        """Which model families of the installed Transformers can be attached; or what becomes of your own model.

        Args:
            model: A folder with a config.json, with or without weights, a config.json, or a run: it is attached and one
                random batch is counted. Without it, all families are listed.
            json: Print JSON.
        """
        return Families(model, json)

    commands = (
        Annotated[Compare, tyro.conf.subcommand("compare")]
        | Annotated[Train, tyro.conf.subcommand("train")]
        | Annotated[Report, tyro.conf.subcommand("report"), tyro.conf.Positional]
        | Annotated[Recipes, tyro.conf.subcommand("recipes", constructor=recipes)]
        | Annotated[Reproduce, tyro.conf.subcommand("reproduce", constructor=reproduce)]
        | Annotated[Audit, tyro.conf.subcommand("audit", constructor=audit)]
        | Annotated[ExportCheck, tyro.conf.subcommand("export-check", constructor=export_check)]
        | Annotated[Families, tyro.conf.subcommand("families", constructor=families)]
    )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                commands,
                prog="equipoise",
                args=arguments,
                description=(
                    "Load balancing for mixture-of-experts training: train small models on real text under any "
                    "strategy and see what balancing did to balance, quality and specialisation."
                ),
                config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(errors.getvalue())) from None


def _one_line(text: str) -> str:
    """What tyro draws in a box, as a sentence."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    words = " ".join(line for line in lines if not line.startswith("╭"))  # the title says the same
    return re.sub(r"[\s╰╯│─]+", " ", words).strip()


def _run(asked: Asked, command: str) -> None:
    if isinstance(asked, Recipes):
        _show_recipes(asked)
        return
    if isinstance(asked, Audit):
        _audit(asked, command)
        return
    if isinstance(asked, ExportCheck):
        _check_export(asked)
        return
    if isinstance(asked, Families):
        _share_the_cores()
        _show_families(asked)
        return
    if isinstance(asked, Report):
        from equipoise_lab.report import write_report

        print(write_report(asked.folder))
        return
    _share_the_cores()
    try:
        from equipoise_lab.train.watch import Terminal, print_table
    except ImportError as error:
        raise EquipoiseError(
            f"the lab needs more than torch: {error.name} is missing. Install it with: pip install 'equipoise[lab]'"
        ) from None
    asked.check()
    if isinstance(asked, Reproduce):
        _reproduce(asked)
        return
    if isinstance(asked, Compare):
        with _shown(Terminal(num_runs=len(asked.runs()))) as terminal:
            from equipoise_lab.train.compare import compare

            results, failure = compare(asked, terminal, command)
        if results and _rank() == 0:
            print_table(asked.out)
            print(f"{asked.out / 'report.html'}", file=sys.stderr)
        if asked.json and _rank() == 0:
            json.dump(results, sys.stdout, ensure_ascii=False, indent=1)
            print()
        if failure is not None:
            raise failure
        return
    with _shown(Terminal()) as terminal:
        from equipoise_lab.train.loop import train

        train(asked, terminal, command)
    if _rank() == 0:
        print_table(asked.out)
        print(asked.out)


def _shown(terminal: "Terminal") -> Any:
    """The terminal of the first rank; the others have nothing to show."""
    return terminal if _rank() == 0 else contextlib.nullcontext(terminal)


def _show_recipes(asked: Recipes) -> None:
    chosen = [recipe(asked.name)] if asked.name else list(RECIPES.values())
    if asked.json:
        content = [asdict(one) for one in chosen]
        json.dump(content[0] if asked.name else content, sys.stdout, ensure_ascii=False, indent=1)
        print()
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if asked.name:
        _show_recipe(chosen[0], console)
    elif console.is_terminal:
        _show_list(chosen, console)
    else:  # a line each, for grep
        names, score_functions = (
            max(len(getattr(one, field)) for one in chosen) for field in ("name", "score_function")
        )
        for one in chosen:
            print(f"{one.name:{names}}  {one.score_function:{score_functions}}  {one.strategy}")


def _audit(asked: Audit, command: str) -> None:
    _share_the_cores()
    try:
        from equipoise_lab.audit.command import COLUMNS, RESULT, audit, table_rows
        from equipoise_lab.report import write_report
        from equipoise_lab.train.watch import Tokens, print_rows
    except ImportError as error:
        raise EquipoiseError(
            f"an audit needs more than torch: {error.name} is missing. Install it with: pip install 'equipoise[lab]'"
        ) from None
    with Tokens() as progress:
        found = audit(asked, progress, command)
    page = write_report(asked.out)
    print_rows(COLUMNS, table_rows(found))
    for note in (*found["words"], *found["notes"]):
        _say(note)
    _say(f"{sum(found['tokens'].values()):,} tokens; {asked.out / RESULT}, {page}")
    if asked.json:
        json.dump(found, sys.stdout, ensure_ascii=False, indent=1)
        print()


def _check_export(asked: ExportCheck) -> None:
    try:
        from equipoise_lab.models.export import check_export
        from equipoise_lab.train.watch import print_rows
    except ImportError as error:
        raise EquipoiseError(
            f"checking a saved model needs more than torch: {error.name} is missing. Install it with: pip install "
            "'equipoise[lab]'"
        ) from None
    found = check_export(asked.checkpoint)
    if asked.json:
        json.dump({**asdict(found), "survived": found.survived}, sys.stdout, ensure_ascii=False, indent=1)
        print()
    elif found.layers:
        columns = (
            "layer",
            "bias",
            "dtype",
            "from",
            "to",
            "experts",
            "distinct",
            "in bfloat16",
            "rerouted by bfloat16",
            "less its mean",
        )
        print_rows(columns, [layer.shown() for layer in found.layers])
    for note in found.notes:
        _say(note)
    if not found.survived:
        _leave(1)


def _show_families(asked: Families) -> None:
    try:
        import transformers  # noqa: F401

        from equipoise_lab.train.watch import print_rows

        if asked.model is not None:
            from equipoise_lab.models.one_model import examine
    except ImportError as error:
        raise EquipoiseError(
            f"looking at models needs more than torch: {error.name} is missing. Install it with: pip install "
            "'equipoise[lab]'"
        ) from None
    if asked.model is not None:
        found = examine(asked.model)
        if asked.json:
            json.dump(asdict(found), sys.stdout, ensure_ascii=False, indent=1)
            print()
            return
        print(
            f"{found.model} ({found.model_type}), {found.num_parameters:,} parameters, {len(found.layers)} MoE layers"
        )
        shown = [
            (
                layer.name,
                str(layer.num_experts),
                str(layer.k),
                layer.score_function,
                layer.selection,
                layer.slot or "-",
                "-" if layer.load is None else " ".join(map(str, layer.load)),
                "-" if layer.maxvio is None else f"{layer.maxvio:.2f}",
            )
            for layer in found.layers
        ]
        print_rows(
            ("layer", "experts", "k", "score_function", "bias on", "slot", "counts", "MaxVio"), shown, stderr=False
        )
        for note in found.notes:
            _say(f"note: {note}")
        return
    rows = _installed_families()
    if asked.json:
        json.dump([asdict(row) for row in rows], sys.stdout, ensure_ascii=False, indent=1)
        print()
        return

    def yes(holds: bool) -> str:
        return "yes" if holds else "no"

    listed = [
        (
            row.model_type,
            row.router or "-",
            row.score_function or "-",
            row.selection or "-",
            f"{row.slot} ({row.slot_held_by})" if row.slot else "-",
            yes(row.group_limits),
            yes(row.hash_layers),
            "without groups" if row.supported and row.group_limits and not row.slot else yes(row.supported),
            yes(row.tested),
            row.reason or "",
        )
        for row in rows
    ]
    titles = (
        "model_type",
        "router",
        "score_function",
        "bias on",
        "slot (held by)",
        "groups",
        "hash",
        "supported",
        "tested",
    )
    print_rows((*titles, "why not"), listed, stderr=False)
    _say(
        "groups: some of its models choose groups of experts first; where these act before a bias, attach refuses. "
        "hash: has layers that choose by the token's id, which nothing balances. tested: our tests attached it."
    )


def _installed_families() -> Any:
    """The list, with a bar on stderr while modules are imported."""
    from rich.console import Console
    from rich.progress import Progress

    from equipoise_lab.models.families import families

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("modeling files of Transformers", total=None)
        return families(lambda done, total, name: progress.update(task, completed=done, total=total))


def _reproduce(asked: Reproduce) -> None:
    from equipoise_lab.reproduce.command import as_json, reproduce, table_rows
    from equipoise_lab.train.watch import Runs, print_rows

    with Runs() as progress:
        if asked.budget != 0 and asked.dtype is None and not _has_bfloat16():
            progress.say(
                "this machine has no bfloat16 instructions: most claims are in bfloat16, which takes several times as "
                "long here. --dtype float32 runs them in that."
            )
        found = reproduce(asked, progress)
    titles = ("comparison", "claimed", "means of the arms", "difference, 95 % interval", "verdict")
    for name in dict.fromkeys(finding.claim.name for finding in found):
        of_claim = [finding for finding in found if finding.claim.name == name]
        _say(f"\n{name}: {of_claim[0].claim.title}")
        print_rows(titles, table_rows(of_claim))
    if asked.json:
        json.dump(as_json(found), sys.stdout, ensure_ascii=False, indent=1)
        print()


def _has_bfloat16() -> bool:
    from equipoise_lab.train.engine import machine

    return machine("auto")[1]


def _show_list(recipes: list[Recipe], console: "Console") -> None:
    from rich.padding import Padding
    from rich.text import Text

    for one in recipes:
        console.print(Text.assemble((one.name, "bold"), "  ", (one.score_function, "dim")))
        strategy = Text("\n+ ".join(split_strategy(one.strategy)), style="cyan")
        console.print(Padding(one.summary, (0, 0, 0, 4)), Padding(strategy, (0, 0, 0, 4)), sep="")
    console.print("One with its sources: equipoise recipes NAME. In Python: attach(model, NAME).", style="dim")


def _show_recipe(one: Recipe, console: "Console") -> None:
    from rich.table import Table

    if not console.is_terminal:
        console.width = 120  # a file has no width
    settings = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("setting", "value", "source"):
        settings.add_column(column, overflow="fold", no_wrap=column != "source")
    for row in one.values():
        settings.add_row(*row)
    notes = Table.grid(padding=(0, 1))
    for note in one.notes:
        notes.add_row("-", note)
    with console.capture() as shown:
        console.print(one.name, style="bold")
        console.print(f"{one.summary}\n")
        console.print(f"{one.strategy}\n", style="cyan", soft_wrap=True)  # one line, to be copied
        console.print(settings)
        if one.notes:
            console.print("", notes, sep="\n")
    print("\n".join(line.rstrip() for line in shown.get().splitlines()))


def _share_the_cores() -> None:
    """Threads of torch wait for each other thousands of times a step. By default they wait in a busy loop, and where
    anything else runs on the machine the one that is waited for does not get its core: a step takes many times as long.
    So they sleep after a short while. It must be said before torch is loaded; what the user has set stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the command ``equipoise``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if threading.current_thread() is threading.main_thread():
        if _num_ranks() > 1:
            Told(_rank()).listen()
        else:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: say how to go on
    if arguments == ["--version"]:
        print(f"equipoise {equipoise.__version__}")
        return
    try:
        _run(_parse(arguments), _launcher() + shlex.join(["equipoise", *arguments]))
    except UsageError as error:
        _fail(error, str(error), 2)
    except EquipoiseError as error:
        _fail(error, str(error), 1)
    except BrokenPipeError:  # whoever read stdout has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _leave(1)
    except OSError as error:
        what = f"files must be there to read and write: {error}. Mend that"
        what += "; --resume goes on with what was begun, if anything was." if arguments[:1] in _RESUMED else "."
        _fail(error, what, 1)
    except KeyboardInterrupt as stop:
        if _rank() == 0:
            _say(f"equipoise: stopped. {str(stop) or 'Go on with the same command and --resume.'}")
        _leave(130)
    except Exception as error:
        if _num_ranks() == 1:
            raise
        if _rank() == 0 or not getattr(error, "of_all_ranks", False):
            traceback.print_exc()
        _leave(1)
    if _num_ranks() > 1 and "equipoise_lab.train.ranks" in sys.modules:
        sys.modules["equipoise_lab.train.ranks"].part()


_RESUMED = (["train"], ["compare"])


def _fail(error: Exception, message: str, code: int) -> None:
    """Says what is wrong: the first rank, and any other whose error is its own. What the command line gets wrong, all
    ranks of a node get wrong."""
    shared = getattr(error, "of_all_ranks", False)
    own = not shared and (not isinstance(error, UsageError) or int(os.environ.get("LOCAL_RANK", "0")) == 0)
    stopped = told()
    own = own and not (stopped is not None and stopped.follows_the_first())
    if _rank() == 0:
        _say(f"equipoise: error: {message}")
    elif own:
        _say(f"equipoise: rank {_rank()}: error: {message}")
    elif shared:
        time.sleep(1)  # torchrun ends all ranks when the first of them leaves: rank 0 says why before
    _leave(code)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _leave(code: int) -> NoReturn:
    """Ends the process. One of several ranks leaves at once: at the usual end of Python, gloo waits for collectives
    that are under way, and the other ranks may be gone."""
    if _num_ranks() > 1 and "torch" in sys.modules:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _rank() -> int:
    return int(os.environ.get("RANK", "0")) if _num_ranks() > 1 else 0


def _launcher() -> str:
    """What torchrun was told, for the command that the run folder records."""
    if _num_ranks() == 1:
        return ""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", _num_ranks()))
    nodes = f"--nnodes {_num_ranks() // here} " if here < _num_ranks() else ""
    return f"torchrun {nodes}--nproc-per-node {here} -m "
