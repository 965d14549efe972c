"""Options in groups, as ``--help`` of train and compare shows them. Imports no torch."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from equipoise_lab.train.option_groups import in_groups

__all__ = ["grouped", "with_joined_lines"]

Options = TypeVar("Options")
Function = TypeVar("Function", bound=Callable[..., Any])

WRAPPED = 80  # a line of at least so many characters that ends within a sentence goes on in the next one


def grouped(options: type[Options], values: Mapping[str, Any]) -> Callable[..., Options]:
    """A function that makes ``options`` from one argument a group. Tyro shows a box for each argument.

    ``values`` are defaults by name, as in the file that ``--config`` names.
    """
    import tyro

    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    types, texts = get_type_hints(options), _texts(options)
    parameters = [inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, annotation=_config(), default=None)]
    for group, names in in_groups(list(fields)).items():
        arguments = [
            (name, Annotated[types[name], tyro.conf.arg(help=texts[name], **_shown(fields[name], types[name]))])
            for name in names
        ]
        of_group = dataclasses.make_dataclass(
            f"{group.title()}Options",
            [
                (name, kind, dataclasses.field(default=values[name]) if name in values else _default(fields[name]))
                for name, kind in arguments
            ],
            kw_only=True,
        )
        of_group.__doc__ = ""
        parameters.append(inspect.Parameter(group, inspect.Parameter.KEYWORD_ONLY, annotation=of_group))

    def make(config: Path | None = None, **by_group: Any) -> Options:
        return options(**{name: value for part in by_group.values() for name, value in vars(part).items()})

    make.__doc__ = options.__doc__
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    make.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return make


def with_joined_lines(function: Function) -> Function:
    """``function`` with each text below ``Args:`` in one line, which tyro then breaks as the terminal is wide."""
    lines = inspect.cleandoc(function.__doc__ or "").splitlines()
    function.__doc__ = re.sub(r"\n {8,}", " ", "\n".join(lines))
    return function


def _joined(text: str) -> str:
    """``text`` without the line breaks within sentences."""
    joined = ""
    for before, line in pairwise(["", *text.splitlines()]):
        is_wrapped = len(before) >= WRAPPED and not before.endswith((".", ":"))
        joined += f"{' ' if is_wrapped else chr(10) if joined else ''}{line}"
    return joined


def _config() -> Any:
    """The option ``--config``. Its file is read before the command line, see ``config_file``."""
    import tyro

    meaning = (
        "A YAML file of options: name: value, a line each. Options on the command line win over it. Every run folder "
        "has one, run.yaml, and every comparison compare.yaml."
    )
    return Annotated[Path | None, tyro.conf.arg(help=meaning, metavar="PATH", help_behavior_hint="")]


def _default(field: "dataclasses.Field[Any]") -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=field.default_factory)
    return dataclasses.field(default=field.default)


def _shown(field: "dataclasses.Field[Any]", kind: Any) -> dict[str, Any]:
    """How the help shows the value and the default of an option."""
    shown: dict[str, Any] = {}
    kinds = [one for one in get_args(kind) if one is not type(None)]
    if isinstance(field.default, tuple) and kinds[0] is str:
        shown["metavar"] = "STR ..."
    elif field.default is None and len(kinds) == 1 and isinstance(kinds[0], type):
        shown["metavar"] = kinds[0].__name__.upper()
    if field.default is None or isinstance(field.default, bool):
        shown["help_behavior_hint"] = ""
    return shown


def _texts(options: type) -> dict[str, str]:
    """The text below each field of a dataclass and of its bases."""
    texts: dict[str, str] = {}
    for one in reversed(options.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(tree, ast.ClassDef)
        for statement, after in zip(tree.body, tree.body[1:], strict=False):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and is_text:
                texts[statement.target.id] = _joined(inspect.cleandoc(after.value.value))  # type: ignore[attr-defined]
    return texts
