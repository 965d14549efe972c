"""``equipoise export-check``."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from equipoise_lab.cli.groups import with_joined_lines
from equipoise_lab.cli.process import exit_process, print_json, print_stderr, requires_lab

__all__ = ["ExportCheck", "run", "subcommand"]

COLUMNS = (
    "layer", "bias", "dtype", "from", "to", "experts", "distinct", "in bfloat16", "rerouted by bfloat16",
    "less its mean",
)  # fmt: skip


@dataclass(frozen=True)
class ExportCheck:
    """The options of ``equipoise export-check``."""

    model: Path
    json: bool


def subcommand() -> Any:
    import tyro

    @with_joined_lines
    def export_check(
        model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
        json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
    ) -> ExportCheck:
        """Does a saved model still hold the balancing bias that it was trained with?

        Args:
            model: Folder of a Transformers model, or of a run. Exits with 1 if a bias is lost. A bias of zeros
                counts as present, with a note: either it never moved or it was lost before. In the table, "distinct" is
                the number of different values of a bias as saved, "in bfloat16" after rounding. "rerouted by bfloat16"
                is the share of random tokens that would choose other experts if an engine rounded the bias to
                bfloat16; "less its mean" is that share if the mean is subtracted first.
            json: Print JSON.
        """
        return ExportCheck(model, json)

    return Annotated[ExportCheck, tyro.conf.subcommand("export-check", constructor=export_check)]


def run(options: ExportCheck, command_line: str) -> None:
    with requires_lab("export-check"):
        from equipoise_lab.models.export import check_export
        from equipoise_lab.train.watch import print_rows
    result = check_export(options.model)
    if options.json:
        print_json({**asdict(result), "survived": result.survived})
    elif result.layers:
        print_rows(COLUMNS, [layer.table_row() for layer in result.layers], stderr=False)
    for note in result.notes:
        print_stderr(note)
    if not result.survived:
        exit_process(1)
