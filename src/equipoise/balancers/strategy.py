"""Strategy strings, the same in Python, on the command line and in a run's config:

none | RECIPE | NAME[:option=value,...][+NAME[:option=value,...]]...        without blanks

loss-free:rate=1e-2,rule=proportional           lbl:scope=micro_batch,coefficient=1e-2
loss-free+lbl:scope=sequence,coefficient=1e-4   deepseek-v3
"""

import inspect
from collections.abc import Sequence

from equipoise.balancers.base import Balancer
from equipoise.balancers.load_balancing import LoadBalancingLoss
from equipoise.balancers.loss_free import Frozen, LossFree
from equipoise.balancers.quantile import Quantile
from equipoise.balancers.z_loss import ZLoss
from equipoise.errors import UsageError
from equipoise.recipes.strings import read_strategy

__all__ = ["format_strategy", "parse_strategy"]

BALANCERS: dict[str, type[Balancer]] = {one.name: one for one in (Frozen, LossFree, Quantile, LoadBalancingLoss, ZLoss)}


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
    classes = BALANCERS | {balancer.name: balancer for balancer in more}
    options = {name: list(inspect.signature(balancer).parameters) for name, balancer in classes.items()}
    text, mechanisms = read_strategy(text, options)
    try:
        return [classes[name](**arguments) for name, arguments in mechanisms]
    except ValueError as error:
        raise UsageError(f"in {text!r}, {error}") from None


def format_strategy(balancers: Sequence[Balancer]) -> str:
    """The string that ``parse_strategy`` turns back into these balancers; ``none`` for no balancer."""
    return "+".join(map(str, balancers)) or "none"
