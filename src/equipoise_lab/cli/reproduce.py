"""``equipoise reproduce``. Its options are in ``reproduce.config``."""

from pathlib import Path
from typing import Annotated, Any, Literal

from equipoise_lab.cli.groups import with_joined_lines
from equipoise_lab.cli.process import print_json, print_stderr, requires_lab, share_cores
from equipoise_lab.reproduce.config import Reproduce
from equipoise_lab.reproduce.edition import DEFAULT, edition_names

__all__ = ["Reproduce", "run", "subcommand"]

CLAIM_COLUMNS = ("claim", "verdict", "difference, 95 % interval")
COLUMNS = ("comparison", "claimed", "means of the arms", "difference, 95 % interval", "verdict")


def subcommand() -> Any:
    import tyro

    editions = f"{{{','.join(edition_names())}}}"

    @with_joined_lines
    def reproduce(
        claim: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[CLAIM]", help_behavior_hint="")] = "all",
        edition: Annotated[str, tyro.conf.arg(metavar=editions)] = DEFAULT,
        budget: Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")] = None,
        out: Path = Path("runs/reproduce"),
        results: Path = Path("benchmarks/results/claims"),
        workers: int = 0,
        dtype: Annotated[
            Literal["bfloat16", "float32"] | None, tyro.conf.arg(metavar="{bfloat16,float32}", help_behavior_hint="")
        ] = None,
        page: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None,
        json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
    ) -> Reproduce:
        """Test what the papers claim, with paired seeds, at the size of a laptop.

        Args:
            claim: The claim to test, such as 1-scope; without it, all. --budget 0 lists them.
            edition: The edition of the evidence: claims, sizes and results of its own.
            budget: Minutes. A run starts only if it should end within them; the same command continues later. 0 runs
                nothing and shows the verdicts of the stored results.
            out: Folder for runs in progress.
            results: Folder of the results: in it a folder for each edition, with one small file per run. A stored
                run is not run again. The default also reads the results that come with equipoise; another, new folder
                runs all of them.
            workers: Runs side by side, one thread each; 0: one for each core.
            dtype: Precision of all runs, in place of the one that the claims name; these results are stored beside the
                others. CPUs without bfloat16 instructions are several times faster in float32.
            page: Write the verdicts on all claims as a Markdown page. Pages beside it have the details: for
                claims.md these are claims_scope.md, claims_mechanisms.md and claims_runs.md.
            json: Print the verdicts as JSON on stdout.
        """
        return Reproduce(claim, edition, budget, out, results, workers, dtype, page, json)

    return Annotated[Reproduce, tyro.conf.subcommand("reproduce", constructor=reproduce)]


def run(options: Reproduce, command_line: str) -> None:
    share_cores()
    with requires_lab("reproduce"):
        from equipoise_lab.train.watch import Runs, print_rows
    options.check()
    from equipoise_lab.reproduce.command import as_json, claim_rows, reproduce, table_rows

    with Runs() as progress:
        if options.budget != 0 and options.needs_bfloat16 and not _has_bfloat16():
            progress.say(
                "this machine has no bfloat16 instructions. Claims that run in bfloat16 take several times as long "
                "here; --dtype float32 runs them in float32."
            )
        findings = reproduce(options, progress)
    if options.claim == "all":
        print_rows(CLAIM_COLUMNS, claim_rows(findings), stderr=options.json)
        print_stderr("What a claim says, and all its comparisons: equipoise reproduce CLAIM --budget 0")
    elif findings:
        print_stderr(f"\n{findings[0].claim.name}: {findings[0].claim.title}")
        print_rows(COLUMNS, table_rows(findings), stderr=options.json)
    if options.json:
        print_json(as_json(findings))


def _has_bfloat16() -> bool:
    from equipoise_lab.train.engine import machine

    return machine("auto")[1]
