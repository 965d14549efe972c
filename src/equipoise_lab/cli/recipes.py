"""``equipoise recipes``."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from equipoise.recipes import RECIPES, Recipe, recipe, split_strategy
from equipoise_lab.cli.groups import with_joined_lines
from equipoise_lab.cli.process import print_json

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Recipes", "run", "subcommand"]

FILE_WIDTH = 120  # characters a line, where stdout is not a terminal


@dataclass(frozen=True)
class Recipes:
    """The options of ``equipoise recipes``."""

    name: str  # "": all recipes
    json: bool


def subcommand() -> Any:
    import tyro

    @with_joined_lines
    def recipes(
        name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]", help_behavior_hint="")] = "",
        json: Annotated[bool, tyro.conf.arg(help_behavior_hint="")] = False,
    ) -> Recipes:
        """Published settings by name: all of them, or one with the source of every value.

        Args:
            name: The recipe to show; without it, all.
            json: Print JSON.
        """
        return Recipes(name, json)

    return Annotated[Recipes, tyro.conf.subcommand("recipes", constructor=recipes)]


def run(options: Recipes, command_line: str) -> None:
    if options.name:
        _show_one(recipe(options.name), options.json)
    else:
        _show_all(list(RECIPES.values()), options.json)


def _show_one(one: Recipe, json: bool) -> None:
    if json:
        print_json(asdict(one))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    settings = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("setting", "value", "source"):
        settings.add_column(column, overflow="fold", no_wrap=column != "source")
    for row in one.values():
        settings.add_row(*row)
    notes = Table.grid(padding=(0, 1))
    for note in one.notes:
        notes.add_row("-", note)
    with console.capture() as page:
        console.print(one.name, style="bold")
        console.print(f"{one.summary}\n")
        console.print(f"{one.strategy}\n", style="cyan", soft_wrap=True)  # on one line, to be copied
        console.print(settings)
        if one.notes:
            console.print("", notes, sep="\n")
    print("\n".join(line.rstrip() for line in page.get().splitlines()))


def _show_all(recipes: list[Recipe], json: bool) -> None:
    if json:
        print_json([asdict(one) for one in recipes])
        return
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if console.is_terminal:
        _print_list(recipes, console)
        return
    names, score_functions = (max(len(getattr(one, field)) for one in recipes) for field in ("name", "score_function"))
    for one in recipes:  # a line each, for grep
        print(f"{one.name:{names}}  {one.score_function:{score_functions}}  {one.strategy}")


def _print_list(recipes: list[Recipe], console: "Console") -> None:
    from rich.padding import Padding
    from rich.text import Text

    for one in recipes:
        console.print(Text.assemble((one.name, "bold"), "  ", (one.score_function, "dim")))
        strategy = Text("\n+ ".join(split_strategy(one.strategy)), style="cyan")
        console.print(Padding(one.summary, (0, 0, 0, 4)), Padding(strategy, (0, 0, 0, 4)), sep="")
    console.print("One with its sources: equipoise recipes NAME. In Python: attach(model, NAME).", style="dim")
