"""Options in groups, as ``--help`` of train and compare shows them. Imports no torch."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

__all__ = ["GROUPS", "grouped"]

Options = TypeVar("Options")

GROUPS: Mapping[str, tuple[str, ...]] = {
    "strategy": ("strategy", "strategies", "seed", "seeds", "then", "switch_at", "selection"),
    "folder": ("out", "resume", "save_model", "checkpoint_every", "json"),
    "text": ("data", "text_key", "tokenizer", "vocab_size", "sequence_length", "sequences", "shuffled"),
    "model": (
        "model", "arch", "score_function", "qk_norm", "layers", "width", "experts", "experts_per_token", "expert_width",
    ),
    "training": (
        "steps", "micro_batches", "balance_batch", "order", "learning_rate", "warmup", "weight_decay", "clip",
    ),
    "trackers": ("tracker", "tracker_layers"),
    "evaluation": ("evaluate_every", "evaluation_sequences"),
    "machine": ("workers", "dtype", "wrapper"),
}  # fmt: skip
OTHER = "other"  # options that no group names


def grouped(options: type[Options]) -> Callable[..., Options]:
    """A function that makes ``options`` from one argument a group. Tyro shows a box for each argument."""
    import tyro

    fields = {field.name: field for field in dataclasses.fields(options)}  # type: ignore[arg-type]
    groups = {group: [name for name in names if name in fields] for group, names in GROUPS.items()}
    groups[OTHER] = [name for name in fields if not any(name in names for names in groups.values())]
    types, texts = get_type_hints(options), _texts(options)
    parameters = []
    for group, names in groups.items():
        if not names:
            continue
        arguments = [
            (name, Annotated[types[name], tyro.conf.arg(help=texts[name], **_shown(fields[name], types[name]))])
            for name in names
        ]
        of_group = dataclasses.make_dataclass(
            f"{group.title()}Options",
            [(name, kind, _default(fields[name])) for name, kind in arguments],
            kw_only=True,
        )
        of_group.__doc__ = ""
        parameters.append(inspect.Parameter(group, inspect.Parameter.KEYWORD_ONLY, annotation=of_group))

    def make(**by_group: Any) -> Options:
        return options(**{name: value for part in by_group.values() for name, value in vars(part).items()})

    make.__doc__ = options.__doc__
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    make.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return make


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
                texts[statement.target.id] = inspect.cleandoc(after.value.value)  # type: ignore[attr-defined]
    return texts
