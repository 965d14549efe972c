"""What helps against uneven experts, by the strategy that runs. Imports no torch."""

from equipoise.recipes import RECIPES, split_strategy

RATE = "loss-free"  # what balances by a rate
# By a coefficient. All but lbl are mechanisms of equipoise_lab, whose runs show alerts too.
COEFFICIENT = ("lbl", "lbl-contrast", "lbl-groups", "lbl-unbiased", "phi", "shinka", "shuffle")
UNKNOWN = {
    "collapse": "Take a larger coefficient or rate, or another mechanism.",
    "dead experts": "The strategy quantile revives them at once, a larger rate of loss-free sooner, a loss slowly.",
    "slow rate": "Raise the rate.",
}


def remedy(kind: str, strategy: str | None) -> str:
    """A sentence for a problem of this kind. It names the strategy, if that is known.

    >>> remedy("collapse", "lbl:scope=micro_batch")
    'The strategy is lbl:scope=micro_batch: raise its coefficient, or take another mechanism.'
    >>> remedy("dead experts", None)
    'The strategy quantile revives them at once, a larger rate of loss-free sooner, a loss slowly.'
    """
    if strategy is None or kind not in UNKNOWN:
        return UNKNOWN.get(kind, "")
    return f"The strategy is {strategy}{_advice(kind, strategy)}"


def _advice(kind: str, strategy: str) -> str:
    written = RECIPES[strategy].strategy if strategy in RECIPES else strategy
    names = [part.partition(":")[0] for part in split_strategy(written)]
    if kind == "slow rate":
        return ": raise its rate."
    if "quantile" in names:
        return (
            ", which evens the load in every step: make sure that step() follows each optimizer step, and that the "
            "text of a step is mixed."
        )
    if all(name in ("none", "frozen", "z") for name in names):
        return ", which does not balance. Take lbl:scope=global_batch, loss-free or quantile."
    levers = ["rate"] if RATE in names else []
    if any(name in COEFFICIENT for name in names):
        levers.append("coefficient")
    lever = f"raise its {' or its '.join(levers)}" if levers else "let it balance more strongly"
    other = "quantile, which revives them at once" if kind == "dead experts" else "another mechanism"
    return f": {lever}, or take {other}."
