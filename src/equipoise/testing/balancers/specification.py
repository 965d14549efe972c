"""A balancer as a specification: it can be copied, and written as a strategy string."""

import math
import pickle
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from equipoise.balancers import Balancer, LayerStack, parse_strategy
from equipoise.balancers.base import POOLINGS, SCOPES
from equipoise.balancers.strategy import BALANCERS
from equipoise.routing import ScoreFunction
from equipoise.testing._common import case, require
from equipoise.testing.balancers._windows import (
    EXPERTS,
    LAYERS,
    Factory,
    K,
    clone_state,
    prepare_balancer,
    require_same_state,
    train,
)


def stays_a_specification(factory: Factory, score_function: ScoreFunction) -> None:
    """A balancer must be a specification: the use of a prepared copy changes neither it nor any other copy."""
    balancer = factory()
    require(balancer.scope in (*SCOPES, "token"), f"scope {balancer.scope!r}, not one of {', '.join(SCOPES)}, token")
    require(balancer.pooling in POOLINGS, f"pooling {balancer.pooling!r}, not one of {', '.join(POOLINGS)}")
    require(math.isfinite(balancer.coefficient), f"coefficient {balancer.coefficient!r}, not a finite number")
    require(bool(balancer.metric), "an empty metric: the loss has no name in the logs")
    require(balancer.has_bias or balancer.has_loss, "a balancer with neither a bias nor a loss")
    options_before = deepcopy(vars(balancer))
    unused, used = deepcopy(balancer), deepcopy(balancer)
    for copy in (unused, used):
        copy.prepare(LayerStack(score_function, K, torch.zeros(LAYERS, EXPERTS)))
    if used.has_bias:
        state_before = clone_state(unused)
        train(used, score_function, range(3))
        require_same_state(clone_state(unused), state_before, "of another copy that was not used")
    notes = used.notes(100)
    are_sentences = isinstance(notes, list) and all(isinstance(note, str) for note in notes)
    require(are_sentences, f"notes(100) gave {notes!r}, not a list of sentences")
    require(_is_same(vars(balancer), options_before), f"attributes {vars(balancer)} that were {options_before} before")


def can_be_copied(factory: Factory, score_function: ScoreFunction) -> None:
    """A deepcopy and a pickle of a balancer, prepared or not, must go on like the original and independently of it."""

    def pickled(balancer: Balancer) -> Balancer:
        return pickle.loads(pickle.dumps(balancer))

    for way, copy_of in (("deepcopy", deepcopy), ("pickle", pickled)):
        with case(copied_by=way):
            require(str(copy_of(factory())) == str(factory()), "another strategy string from the copy")
            balancer = prepare_balancer(factory, score_function)
            if not balancer.has_bias:
                require(_is_same(vars(copy_of(balancer)), vars(balancer)), "another state in the copy")
                continue
            train(balancer, score_function, range(2))
            state_before, copy = clone_state(balancer), copy_of(balancer)
            train(copy, score_function, range(2, 4))
            require_same_state(clone_state(balancer), state_before, "of the original, while only the copy was used")
            train(balancer, score_function, range(2, 4))
            require_same_state(
                clone_state(copy), clone_state(balancer), "of the copy, after the same windows as the original"
            )


def has_a_strategy_string(factory: Factory, score_function: ScoreFunction) -> None:
    """str(balancer) must be the same for the same options, and must make it again if its name is registered."""
    balancer = factory()
    text, again = str(balancer), str(factory())
    require(text == again and " at 0x" not in text, f"{text!r} and {again!r} from two calls of the factory")
    if BALANCERS.get(balancer.name) is not type(balancer):
        return
    parsed = parse_strategy(text)
    require(len(parsed) == 1 and type(parsed[0]) is type(balancer), f"{text!r}, which makes {parsed}")
    require(
        _is_same(vars(parsed[0]), vars(balancer)),
        f"{text!r}, which makes a balancer with {vars(parsed[0])}, not {vars(balancer)}",
    )
    require(str(parsed[0]) == text, f"{text!r}, which comes back as {str(parsed[0])!r}")


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return a == b or (type(a) is type(b) and hasattr(a, "__dict__") and _is_same(vars(a), vars(b)))
