"""``equipoise audit``. Its options are in ``audit.config``."""

from pathlib import Path
from typing import Annotated, Any

from equipoise_lab.audit.config import Audit
from equipoise_lab.cli.groups import with_joined_lines
from equipoise_lab.cli.process import print_json, print_stderr, requires_lab, share_cores

__all__ = ["Audit", "run", "subcommand"]


def subcommand() -> Any:
    import tyro

    @with_joined_lines
    def audit(
        model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
        data: str = "corpus",
        text_key: str = "text",
        tokens: int = 100_000,
        out: Path = Path("runs/audit"),
        sequence_length: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")] = None,
        batch: int = 8,
        json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
    ) -> Audit:
        """What the experts of a saved model do on text: balance by layer, specialisation by domain and token.

        Args:
            model: Folder of a Transformers model with its tokenizer, or of a run of `equipoise train`.
            data: Text by domain, as in `equipoise train --data`.
            text_key: The field or column that holds the text, as in `equipoise train --text-key`.
            tokens: Tokens in all, the same number from every domain.
            out: Folder for audit.json and report.html.
            sequence_length: Tokens a row; by default 512, or the model's maximum if that is less.
            batch: Rows a forward.
            json: Print audit.json on stdout, and the table on stderr.
        """
        return Audit(model, data, tokens, out, sequence_length, batch, json, text_key)

    return Annotated[Audit, tyro.conf.subcommand("audit", constructor=audit)]


def run(options: Audit, command_line: str) -> None:
    options.check()
    share_cores()
    with requires_lab("audit"):
        from equipoise_lab.audit.command import COLUMNS, RESULT, audit, table_rows
        from equipoise_lab.report import write_report
        from equipoise_lab.train.watch import Tokens, print_rows
    with Tokens() as progress:
        result = audit(options, progress, command_line)
    page = write_report(options.out)
    print_rows(COLUMNS, table_rows(result), stderr=options.json)
    for note in (*result["words"], *result["notes"]):
        print_stderr(note)
    print_stderr(f"{sum(result['tokens'].values()):,} tokens; {options.out / RESULT}, {page}")
    if options.json:
        print_json(result)
