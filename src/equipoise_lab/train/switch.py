"""Another strategy from some step on: what the one before hands over."""

import torch
from torch import nn

from equipoise.balance import Balance
from equipoise.balancers import LossFree
from equipoise.errors import UsageError
from equipoise.routers.find import find_routers
from equipoise_lab.train.balancers import attach_strategy, parse_lab_strategy

__all__ = ["check_switch", "holds_biases", "moves_by_rate", "switch"]


def holds_biases(strategy: str) -> bool:
    return any(balancer.has_bias for balancer in parse_lab_strategy(strategy))


def moves_by_rate(strategy: str, window: int) -> bool:
    """Whether it moves biases by a rate that is not zero, after ``window`` windows have ended."""
    return any(isinstance(one, LossFree) and one.rate_at(window) > 0 for one in parse_lab_strategy(strategy))


def check_switch(strategy: str, then: str) -> None:
    """Raises UsageError where ``then`` cannot follow ``strategy``."""
    before, after = parse_lab_strategy(strategy), parse_lab_strategy(then)
    if list(map(str, before)) == list(map(str, after)):
        raise UsageError(f"--then must be another strategy than --strategy: got {then} after {strategy}.")
    first, second = ({one.multiplies for one in balancers if one.has_bias} for balancers in (before, after))
    if first and second and first != second:
        raise UsageError(
            "--then must take up the biases of --strategy, and those that are added and those that multiply cannot "
            f"take each other's place: got {then} after {strategy}."
        )


@torch.no_grad()
def switch(model: nn.Module, balance: Balance, strategy: str) -> Balance:
    """Ends ``balance`` and attaches ``strategy`` in its place, between two steps. Collective, as ``attach`` is.

    Biases, and what moves with them, go on where both strategies hold some. Where only the one before did they end,
    and the routers choose by their scores alone. What balancers without a bias keep goes on by its name. The number
    of windows goes on, so that a schedule does not begin anew.
    """
    before = balance.state_dict()
    held, holds = holds_biases(before["strategy"]), holds_biases(strategy)
    balance.detach()
    if held and not holds:
        for router in find_routers(model):
            if router.slot is not None and router.slot.tensor is not None:
                router.slot.tensor.zero_()
    after = attach_strategy(model, strategy)
    begin = before if held and holds else after.state_dict()
    apart = {name: value for name, value in before["state"].items() if "." in name}  # of balancers without a bias
    state = begin["state"] | apart
    after.load_state_dict(before | {"biases": begin["biases"], "multiplies": begin["multiplies"], "state": state})
    return after
