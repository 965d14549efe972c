"""Changes the strategy during a run: what the first strategy hands over to the second."""

import torch
from torch import nn

from equipoise.balance import Balance
from equipoise.balancers import LossFree
from equipoise.errors import UsageError
from equipoise.routers.find import find_routers
from equipoise_lab.train.balancers import attach_strategy, parse_lab_strategy

__all__ = ["check_switch", "has_biases", "has_positive_rate", "switch"]


def has_biases(strategy: str) -> bool:
    return any(balancer.has_bias for balancer in parse_lab_strategy(strategy))


def has_positive_rate(strategy: str, window: int) -> bool:
    """Whether the strategy moves biases by a rate above zero after ``window`` windows. A schedule may end at zero."""
    balancers = parse_lab_strategy(strategy)
    return any(isinstance(balancer, LossFree) and balancer.rate_at(window) > 0 for balancer in balancers)


def check_switch(strategy: str, then: str) -> None:
    """Raises UsageError if ``then`` cannot follow ``strategy``."""
    before, after = parse_lab_strategy(strategy), parse_lab_strategy(then)
    if list(map(str, before)) == list(map(str, after)):
        raise UsageError(f"--then must be another strategy than --strategy: got {then} after {strategy}.")
    first, second = ({one.multiplies for one in balancers if one.has_bias} for balancers in (before, after))
    if first and second and first != second:
        raise UsageError(
            "--then must be able to continue the biases of --strategy. Biases that are added and biases that multiply "
            f"cannot replace each other: got {then} after {strategy}."
        )


@torch.no_grad()
def switch(model: nn.Module, balance: Balance, strategy: str) -> Balance:
    """Ends ``balance`` and attaches ``strategy`` in its place, between two steps. Collective, as ``attach`` is.

    If both strategies have biases, the biases and what moves with them (momentum) continue. If only the first has
    biases, they are removed, and the routers choose by their scores alone. The state of balancers without a bias
    continues under its name. The number of windows continues too, so that a schedule does not start again.
    """
    state_before = balance.state_dict()
    had_biases, keeps_biases = has_biases(state_before["strategy"]), has_biases(strategy)
    balance.detach()
    if had_biases and not keeps_biases:
        for router in find_routers(model):
            if router.slot is not None and router.slot.tensor is not None:
                router.slot.tensor.zero_()
    after = attach_strategy(model, strategy)
    biases_from = state_before if had_biases and keeps_biases else after.state_dict()
    # A name with a dot is the state of a balancer without a bias.
    other_state = {name: value for name, value in state_before["state"].items() if "." in name}
    state = biases_from["state"] | other_state
    biases = {"biases": biases_from["biases"], "multiplies": biases_from["multiplies"]}
    after.load_state_dict(state_before | biases | {"state": state})
    return after
