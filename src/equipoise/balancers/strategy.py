"""Strategy strings, the same in Python, on the command line and in a run's config:

none | RECIPE | NAME[:option=value,...] [+ NAME[:option=value,...]] ...

loss-free:rate=1e-2,rule=proportional           lbl:scope=micro_batch,coefficient=1e-2
loss-free+lbl:scope=sequence,coefficient=1e-4   deepseek-v3
"""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from equipoise.balancers.base import Balancer
from equipoise.balancers.load_balancing import LoadBalancingLoss
from equipoise.balancers.loss_free import Frozen, LossFree
from equipoise.balancers.quantile import Quantile
from equipoise.balancers.z_loss import ZLoss
from equipoise.errors import UsageError
from equipoise.recipes import RECIPES, WITHHELD, recipe, split_strategy

__all__ = ["format_strategy", "parse_strategy"]

BALANCERS: dict[str, type[Balancer]] = {one.name: one for one in (Frozen, LossFree, Quantile, LoadBalancingLoss, ZLoss)}


def _value(text: str) -> object:
    if text in ("true", "false"):
        return text == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _parse_one(text: str, whole: str, classes: Mapping[str, type[Balancer]]) -> Balancer:
    name, colon, options = text.partition(":")
    if name in RECIPES:
        raise UsageError(
            f"A recipe must stand alone: got {whole!r}. Copy its string, {RECIPES[name].strategy}, and change it; or "
            f"pass several strategies: attach(model, {name!r}, 'z')."
        )
    if name == "none":
        raise UsageError(f"The strategy none must stand alone: got {whole!r}. Leave it out.")
    if name not in classes:
        close = get_close_matches(name.lower().replace("_", "-"), [*classes, *RECIPES], n=1)
        example = "Example: loss-free:rate=1e-3+lbl:scope=sequence,coefficient=1e-4"
        raise UsageError(
            f"A strategy must be none, or made of {', '.join(classes)}, or a recipe ({', '.join(RECIPES)}): got "
            f"{name!r}{'' if name == whole else f' in {whole!r}'}. {f'Did you mean {close[0]}?' if close else example}"
        )
    known = list(inspect.signature(classes[name]).parameters)
    arguments: dict[str, object] = {}
    for option in options.split(",") if colon else []:
        key, equals, value = option.partition("=")
        if not equals or key not in known:
            raise UsageError(
                f"An option of {name} must be {' or '.join(f'{k}=...' for k in known) or 'left out: it has none'}: got "
                f"{option!r} in {whole!r}."
            )
        if key in arguments:
            raise UsageError(f"An option must be given once: got {key} twice in {whole!r}. Leave one out.")
        arguments[key] = _value(value)
    try:
        return classes[name](**arguments)
    except ValueError as error:
        raise UsageError(f"{error} (in {whole!r})") from None


def parse_strategy(text: str, *, more: Sequence[type[Balancer]] = ()) -> list[Balancer]:
    """The balancers of a strategy string or of a recipe. ``none`` gives no balancer.

    Args:
        text: a strategy string, or the name of a recipe.
        more: classes that the string may name besides those of equipoise, by their ``name``.

    Raises:
        UsageError: an unknown name or option, or a value that is not allowed.

    Examples:
        >>> [str(one) for one in parse_strategy("loss-free:rate=1e-2+lbl:scope=sequence")]
        ['loss-free:rate=0.01', 'lbl:scope=sequence']
    """
    if text == "none":
        return []
    if not text:
        raise UsageError("A strategy must have a name: got an empty one. Use none for no balancing.")
    if text in RECIPES or text in WITHHELD:
        text = recipe(text).strategy
    classes = BALANCERS | {balancer.name: balancer for balancer in more}
    return [_parse_one(part, text, classes) for part in split_strategy(text)]


def format_strategy(balancers: Sequence[Balancer]) -> str:
    """The string that ``parse_strategy`` turns back into these balancers; ``none`` for no balancer."""
    return "+".join(map(str, balancers)) or "none"
