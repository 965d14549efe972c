"""What ``update`` does to the bias."""

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from equipoise.balancers import Balancer, LayerStack
from equipoise.routing import ScoreFunction
from equipoise.testing._common import NotApplicable, case, is_close, require, require_same
from equipoise.testing.balancers._windows import (
    EXPERTS,
    LAYERS,
    TOKENS,
    Call,
    Factory,
    K,
    clone_state,
    close_window,
    collect_window,
    get_bias,
    get_state,
    prepare_balancer,
    random_bias,
    random_logits,
    require_same_state,
    require_update,
    route_call,
    seeded,
    take_tokens,
    train,
)


def _edge_cases() -> Iterator[tuple[str, Float[Tensor, "layers tokens experts"], Tensor | None, int]]:
    """(name, logits, mask, k)"""
    order = torch.arange(EXPERTS, dtype=torch.float32)
    descending = order.flip(0).expand(LAYERS, TOKENS, EXPERTS)
    yield "no tokens", random_logits(1, 0), None, K
    yield "all tokens masked", random_logits(1), torch.zeros(TOKENS), K
    yield "one token", random_logits(1, 1), None, K
    yield "all tokens to one expert", 50 * descending, None, 1
    yield "k = experts", random_logits(1), None, EXPERTS
    yield "ties: all logits 0", torch.zeros(LAYERS, TOKENS, EXPERTS), None, K
    yield "a dead expert", torch.where(order == 0, -1e4, random_logits(1)), None, K
    yield "logits of 1e4", 1e4 * random_logits(1), None, K
    yield "logits of -1e4", random_logits(1) - 1e4, None, K


def _busiest_minus_idlest(bias: Tensor, load: Tensor) -> Float[Tensor, " layers"]:
    """By layer, the bias of the busiest expert less the bias of the idlest."""
    busiest, idlest = (bias.gather(1, i.unsqueeze(1)) for i in (load.argmax(-1), load.argmin(-1)))
    return (busiest - idlest).flatten()


def stays_finite(factory: Factory, score_function: ScoreFunction) -> None:
    """Bias and state must stay finite for any window, and a factor 1 + bias must not fall below 0."""
    require_update(factory)
    for name, logits, mask, k in _edge_cases():
        for start in (torch.zeros(LAYERS, EXPERTS), random_bias()):
            with case(window=name, logits=tuple(logits.shape), k=k):
                balancer = prepare_balancer(factory, score_function, start, k)
                for window in range(3):
                    close_window(balancer, [[route_call(balancer, logits, score_function, k, mask)]], window)
                    for key, value in get_state(balancer).items():
                        require(value.isfinite().all(), f"{key} {value.tolist()}")
                    factor = 1 + get_bias(balancer)
                    require(not balancer.multiplies or factor.min() >= 0, f"a factor of {factor.min().item():.9g}")


def handles_huge_counts(factory: Factory, score_function: ScoreFunction) -> None:
    """Counts above 2^24 and 2^31 must move the bias in the direction in which the same shares of few tokens move it."""
    require_update(factory)
    balancer = prepare_balancer(factory, score_function)
    load, statistic = collect_window(balancer, [[route_call(balancer, random_logits(3), score_function)]])
    if statistic is not None and balancer.gathers:
        raise NotApplicable  # statistics with one row per token cannot be that many
    expected: Tensor | None = None
    for times in (1, 2**20 + 1, 2**24 + 1, 2**29, 2**31 + 1, 2**40):
        with case(counts=f"of {TOKENS} tokens times {times}", seed=3):
            copy = prepare_balancer(factory, score_function)
            copy.update(load * times, None if statistic is None else [value * times for value in statistic], 0)
            require(all(value.isfinite().all() for value in get_state(copy).values()), "a bias that is not finite")
            direction = _busiest_minus_idlest(get_bias(copy), load).sign()
            expected = direction if expected is None else expected
            require(
                torch.equal(direction, expected),
                f"by layer, the busiest expert moved against the idlest with the signs {direction.tolist()}; with few "
                f"tokens {expected.tolist()}",
            )


def ignores_empty_windows(factory: Factory, score_function: ScoreFunction) -> None:
    """A window without unmasked tokens must move nothing from a state of zero."""
    require_update(factory)
    for name, tokens, mask in (("no tokens", 0, None), ("all tokens masked", TOKENS, torch.zeros(TOKENS))):
        for start in (torch.zeros(LAYERS, EXPERTS), random_bias()):
            balancer = prepare_balancer(factory, score_function, start.clone())
            with case(window=name):
                close_window(balancer, [[route_call(balancer, random_logits(1, tokens), score_function, mask=mask)]])
                require_same(get_bias(balancer), start, "a bias that moved to", atol=1e-6)


def keeps_an_even_load(factory: Factory, score_function: ScoreFunction) -> None:
    """Where the load alone decides, an even load must move no expert against another from a state of zero."""
    require_update(factory)
    if type(factory()).statistic is not Balancer.statistic:
        raise NotApplicable
    balancer = prepare_balancer(factory, score_function)
    load = torch.full((LAYERS, EXPERTS), 7)
    by_layer = balancer.micro_batch_statistic(load)
    balancer.update(load, None if by_layer is None else list(by_layer), 0)
    bias = get_bias(balancer)
    with case(load="7 for every expert"):
        require((bias == bias[:, :1]).all(), f"the bias {bias.tolist()}")


def separates_layers(factory: Factory, score_function: ScoreFunction) -> None:
    """A layer's bias must depend on that layer alone: on no other's load, number of tokens, statistic or bias."""
    require_update(factory)
    for row in range(LAYERS):
        states = []
        for seed, tokens in ((1, TOKENS), (2, TOKENS // 8)):
            logits, start = list(random_logits(seed, tokens)), random_bias(seed)
            logits[row], start[row] = random_logits(3)[row], random_bias(3)[row]
            balancer = prepare_balancer(factory, score_function, start)
            for window in range(2):
                close_window(balancer, [[route_call(balancer, logits, score_function)]], window)
            states.append({name: value[row].clone() for name, value in get_state(balancer).items()})
        with case(layer=row, seeds_of_the_others=(1, 2), tokens_of_the_others=(TOKENS, TOKENS // 8)):
            require_same_state(states[1], states[0], "when another layer changed")


def permutes_with_experts(factory: Factory, score_function: ScoreFunction) -> None:
    """Experts in another order must give the same biases in that order; where a statistic ignores some tokens, this
    must hold for the tokens that count in both orders."""
    require_update(factory)
    order = torch.randperm(EXPERTS, generator=seeded(4))
    identity = torch.arange(EXPERTS)
    start = random_bias()

    def call_in(order: Tensor, logits: Tensor, tokens: Sequence[Tensor] | None = None) -> tuple[Balancer, Call]:
        balancer = prepare_balancer(factory, score_function, start[:, order].clone())
        call = route_call(balancer, logits[..., order], score_function)
        if tokens is not None:
            call = [take_tokens(routing, index) for routing, index in zip(call, tokens, strict=True)]
        return balancer, call

    def moved_bias(balancer: Balancer, call: Call) -> Tensor:
        close_window(balancer, [[call]])
        return get_bias(balancer)

    for seed in (5, 6):
        with case(seed=seed, tokens=TOKENS, order=order.tolist()):
            logits = random_logits(seed, TOKENS)
            expected, permuted = (moved_bias(*call_in(way, logits)) for way in (identity, order))
            if not is_close(permuted, expected[:, order], 1e-5, 1e-6):
                counted = [_counted_tokens(*call_in(way, logits)) for way in (identity, order)]
                in_both = [(a & b).nonzero()[:, 0] for a, b in zip(*counted, strict=True)]
                expected, permuted = (moved_bias(*call_in(way, logits, in_both)) for way in (identity, order))
            require_same(permuted, expected[:, order], "a bias of", rtol=1e-5, atol=1e-6)


def _counted_tokens(balancer: Balancer, call: Call) -> list[Bool[Tensor, " tokens"]]:
    """By layer, the tokens that give another statistic than a masked token; all tokens, if there is no statistic."""
    by_layer = []
    for row, routing in enumerate(call):
        is_counted = []
        for index in range(routing.logits.shape[0]):
            token = take_tokens(routing, torch.tensor([index]))
            unmasked, masked = (balancer.statistic(token._replace(mask=torch.tensor([m])), row) for m in (1.0, 0.0))
            is_counted.append(unmasked is None or masked is None or not torch.equal(unmasked, masked))
        by_layer.append(torch.tensor(is_counted))
    return by_layer


def is_deterministic(factory: Factory, score_function: ScoreFunction) -> None:
    """The same windows must give the same biases bit for bit, whatever the state of the global random generator, which
    must stay as it is."""
    require_update(factory)
    states = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]), case(global_seed=seed):
            torch.manual_seed(seed)
            generator_before = torch.get_rng_state()
            balancer = prepare_balancer(factory, score_function)
            train(balancer, score_function, range(3))
            states.append(clone_state(balancer))
            require_same_state(states[-1], states[0], "after three windows")
            require(torch.equal(torch.get_rng_state(), generator_before), "the global generator was used")


def is_independent_of_the_division(factory: Factory, score_function: ScoreFunction) -> None:
    """However a window's tokens are divided between calls, micro-batches and ranks, in any order, the bias must be the
    same. A balancer with a statistic of micro-batches gets the same micro-batches each time."""
    require_update(factory)
    fresh = prepare_balancer(factory, score_function, random_bias())
    whole = route_call(fresh, random_logits(8), score_function)
    empty = [take_tokens(routing, torch.arange(0)) for routing in whole]

    def cut(index: Tensor, *ends: int) -> list[Call]:
        return [[take_tokens(routing, part) for routing in whole] for part in index.tensor_split(ends)]

    first, second, third = cut(torch.arange(TOKENS), 10, 25)
    shuffled = torch.randperm(TOKENS, generator=seeded(9))
    divisions: dict[str, list[list[Call]]]
    if fresh.micro_batch_statistic(torch.ones(LAYERS, EXPERTS, dtype=torch.int64)) is not None:
        divisions = {
            "three micro-batches": [[first], [second], [third]],
            "the same in another order": [[third], [first], [second]],
            "one more without tokens": [[first], [empty], [second], [third]],
            "their calls halved": [
                cut(torch.arange(0, 10), 5),
                cut(torch.arange(10, 25), 5),
                cut(torch.arange(25, 48), 9),
            ],
        }
    else:
        divisions = {
            "one call": [[whole]],
            "one call, shuffled": [cut(shuffled)],
            "three calls": [[first, second, third]],
            "three micro-batches": [[first], [second], [third]],
            "four shuffled micro-batches of two calls": [
                cut(part, part.numel() // 3) for part in shuffled.tensor_split((7, 9, 30))
            ],
            "calls and micro-batches without tokens": [[empty], [third, first], [empty, second]],
        }
    expected: Tensor | None = None
    for name, micro_batches in divisions.items():
        with case(divided_into=name, compared_with=next(iter(divisions)), tokens=TOKENS, seed=8):
            balancer = prepare_balancer(factory, score_function, random_bias())
            close_window(balancer, micro_batches)
            bias = get_bias(balancer)
            expected = bias if expected is None else expected
            require_same(bias, expected, "a bias of", rtol=1e-6 if balancer.gathers else 0)


def ignores_masked_tokens(factory: Factory, score_function: ScoreFunction) -> None:
    """A window with masked tokens must give the same as the window without them, whatever their logits are."""
    require_update(factory)
    mask = (torch.rand(TOKENS, generator=seeded(10)) < 0.6).float()
    logits = random_logits(11)
    logits[:, mask == 0] = 1e4 * random_logits(12)[:, mask == 0]
    balancer, other = (prepare_balancer(factory, score_function, random_bias()) for _ in range(2))
    masked = route_call(balancer, logits, score_function, mask=mask)
    sliced = [take_tokens(routing, mask.nonzero()[:, 0])._replace(mask=None) for routing in masked]
    close_window(balancer, [[masked]])
    close_window(other, [[sliced]])
    with case(seed=11, tokens=TOKENS, masked=int((mask == 0).sum())):
        require_same_state(clone_state(balancer), clone_state(other), "with masked tokens")


def moves_against_the_load(factory: Factory, score_function: ScoreFunction) -> None:
    """Against a skewed router the busiest expert's bias must fall relative to the idlest's in the first window, and
    the max violation must fall within 200 windows."""
    require_update(factory)
    experts, tokens = 8, 256
    logits = random_logits(13, tokens, experts)
    balancer = deepcopy(factory())
    balancer.prepare(LayerStack(score_function, K, torch.zeros(LAYERS, experts)))
    history: list[Tensor] = []
    with case(seed=13, layers=LAYERS, tokens=tokens, experts=experts):
        for window in range(200):
            load = close_window(balancer, [[route_call(balancer, logits, score_function)]], window)
            history.append(load.amax(-1) / load.double().mean(-1) - 1)
            if window == 0:
                difference = _busiest_minus_idlest(get_bias(balancer), load)
                require(
                    (difference < 0).all(),
                    f"by layer, a bias that moved the busiest by {difference.tolist()} against the idlest",
                )
            first, last = history[0], torch.stack(history[-10:]).mean(0)
            if (last < first / 2).all():
                return
        require(
            (last < first).all(),
            f"by layer, a max violation of {last.tolist()} at the end and {first.tolist()} at the start",
        )
