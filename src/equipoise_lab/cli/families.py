"""``equipoise families``."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from equipoise.errors import UsageError, suggest
from equipoise_lab.cli.groups import with_joined_lines
from equipoise_lab.cli.process import print_json, print_stderr, requires_lab, share_cores

if TYPE_CHECKING:
    from equipoise_lab.models.examine import ExaminedLayer
    from equipoise_lab.models.families import Family

__all__ = ["Families", "run", "subcommand"]

MODEL_COLUMNS = ("layer", "experts", "k", "score function", "bias added to", "slot", "counts", "MaxVio")
FAMILY_COLUMNS = ("model_type", "router", "supported")
WIDE_COLUMNS = (
    "model_type", "router", "score function", "bias added to", "slot (held by)", "groups", "hash", "supported",
    "tested", "why not",
)  # fmt: skip


@dataclass(frozen=True)
class Families:
    """The options of ``equipoise families``."""

    model: Path | None  # None: list all families; a name instead of a path: list those with it in their name
    json: bool
    wide: bool


def subcommand() -> Any:
    import tyro

    @with_joined_lines
    def families(
        model: Annotated[
            Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]", help_behavior_hint="")
        ] = None,
        wide: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
        json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
    ) -> Families:
        """Which model families of the installed Transformers can be attached, or whether your own model can be.

        Args:
            model: A folder with a config.json, with or without weights; a config.json; or a run. The model is
                attached. If there are weights, one random batch is counted. Or a part of a name, such as qwen: only
                these families are listed. Without MODEL, all are.
            wide: All ten columns of the list, in place of three.
            json: Print JSON.
        """
        return Families(model, json, wide)

    return Annotated[Families, tyro.conf.subcommand("families", constructor=families)]


def run(options: Families, command_line: str) -> None:
    share_cores()
    if options.model is None or _is_name(options.model):
        _show_families(options)
    else:
        _show_model(options.model, options.json)


def _is_name(model: Path) -> bool:
    return not model.exists() and len(model.parts) == 1 and model.suffix != ".json"


def _show_model(path: Path, json: bool) -> None:
    with requires_lab("families"):
        import transformers  # noqa: F401

        from equipoise_lab.models.examine import examine
        from equipoise_lab.train.watch import print_rows
    examined = examine(path)
    if json:
        print_json(asdict(examined))
        return
    print(
        f"{examined.model} ({examined.model_type}), {examined.num_parameters:,} parameters, "
        f"{len(examined.layers)} MoE layers"
    )
    print_rows(MODEL_COLUMNS, [_layer_row(layer) for layer in examined.layers], stderr=False)
    for note in examined.notes:
        print_stderr(f"note: {note}")


def _layer_row(layer: "ExaminedLayer") -> tuple[str, ...]:
    return (
        layer.name,
        f"{layer.num_experts} ({layer.zero_experts} zero)" if layer.zero_experts else str(layer.num_experts),
        str(layer.k),
        layer.score_function,
        layer.selection,
        layer.slot or "-",
        "-" if layer.load is None else " ".join(map(str, layer.load)),
        "-" if layer.maxvio is None else f"{layer.maxvio:.2f}",
    )


def _show_families(options: Families) -> None:
    with requires_lab("families"):
        import transformers  # noqa: F401

        from equipoise_lab.train.watch import print_rows
    families = _installed_families()
    if options.model is not None:
        families = _named(families, str(options.model))
    if options.json:
        print_json([asdict(family) for family in families])
        return
    if not options.wide:
        print_rows(FAMILY_COLUMNS, [_short_row(family) for family in families], stderr=False)
        print_stderr("All columns: equipoise families --wide")
        return
    print_rows(WIDE_COLUMNS, [_family_row(family) for family in families], stderr=False)
    print_stderr(
        "groups: some of the family's models first choose groups of experts; where that happens before the bias is "
        "added, attach refuses. hash: some layers choose experts by the token's id, so nothing can balance them. "
        "tested: our tests attached it."
    )


def _named(families: "list[Family]", name: str) -> "list[Family]":
    """The families with ``name`` in their own name or in that of their router, whatever the case and the ``_``."""

    def plain(text: str | None) -> str:
        return re.sub(r"[\W_]", "", text or "").lower()

    chosen = [one for one in families if plain(name) in plain(one.model_type) or plain(name) in plain(one.router)]
    if not chosen:
        near = suggest(name, dict.fromkeys(family.model_type for family in families))
        raise UsageError(
            f"MODEL must be a path, or a part of the name of a family: {name} does not exist, and no family of the "
            f"installed Transformers has it in its name.{near or ' `equipoise families` lists them.'}"
        )
    return chosen


def _short_row(family: "Family") -> tuple[str, str, str]:
    row = dict(zip(WIDE_COLUMNS, _family_row(family), strict=True))
    supported = f"{row['supported']}: {row['why not']}" if row["why not"] else row["supported"]
    return row["model_type"], row["router"], supported


def _family_row(family: "Family") -> tuple[str, ...]:
    def yes_no(value: bool) -> str:
        return "yes" if value else "no"

    only_without_groups = family.supported and family.group_limits and not family.slot
    return (
        family.model_type,
        family.router or "-",
        family.score_function or "-",
        family.selection or "-",
        f"{family.slot} ({family.slot_held_by})" if family.slot else "-",
        yes_no(family.group_limits),
        yes_no(family.hash_layers),
        "without groups" if only_without_groups else yes_no(family.supported),
        yes_no(family.tested),
        family.reason or "",
    )


def _installed_families() -> "list[Family]":
    """All families, with a bar on stderr while the modeling files are imported."""
    from rich.console import Console
    from rich.progress import Progress

    from equipoise_lab.models.families import families

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("modeling files of Transformers", total=None)
        return families(lambda done, total, package: progress.update(task, completed=done, total=total))
