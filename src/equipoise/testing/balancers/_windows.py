"""Random windows, made as the library makes them.

The bias as it is now routes every call. The balancer is asked for a statistic of each call and of each micro-batch.
These are summed, or concatenated where it gathers, and reach ``update`` together with the load.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers import Balancer, LayerStack
from equipoise.routing import Routing, ScoreFunction, score
from equipoise.testing._common import NotApplicable, require, require_same

Factory = Callable[[], Balancer]
Call = list[Routing]  # one forward: the routing of every layer
EXPERTS, K, LAYERS, TOKENS = 6, 2, 2, 48
SEQUENCE_LENGTH = 5


def prepare_balancer(
    factory: Factory, score_function: ScoreFunction, bias: Float[Tensor, "layers experts"] | None = None, k: int = K
) -> Balancer:
    """A prepared copy, as ``attach`` makes it."""
    balancer = deepcopy(factory())
    balancer.prepare(LayerStack(score_function, k, torch.zeros(LAYERS, EXPERTS) if bias is None else bias))
    return balancer


def require_update(factory: Factory) -> None:
    """Passes over a balancer that moves no bias."""
    balancer = factory()
    if not balancer.has_bias or type(balancer).update is Balancer.update:
        raise NotApplicable


# ---- random inputs ----


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_bias(seed: int = 7) -> Float[Tensor, "layers experts"]:
    """The mean of each layer is zero."""
    bias = 0.05 * torch.randn(LAYERS, EXPERTS, generator=seeded(seed), dtype=torch.float64)
    return (bias - bias.mean(-1, keepdim=True)).float()


def random_logits(seed: int, tokens: int = TOKENS, experts: int = EXPERTS) -> Float[Tensor, "layers tokens experts"]:
    """Each of the two layers prefers other experts."""
    skew = torch.linspace(1, -1, experts)
    return torch.randn(LAYERS, tokens, experts, generator=seeded(seed)) + torch.stack([skew, skew.flip(0)])[:, None]


# ---- calls ----


def route_layer(
    logits: Float[Tensor, "tokens experts"],
    k: int,
    score_function: ScoreFunction,
    bias: Float[Tensor, " experts"] | None = None,
    multiplies: bool = False,
    mask: Float[Tensor, " tokens"] | None = None,
) -> Routing:
    scores = score(logits, score_function)
    choice = scores.detach()
    if bias is not None:
        choice = choice * (1 + bias) if multiplies else choice + bias
    expert_ids = choice.topk(k, dim=-1).indices
    tokens = logits.shape[0]
    sequence_ids = torch.arange(tokens, device=logits.device) // SEQUENCE_LENGTH
    weights = scores.gather(-1, expert_ids).detach()
    return Routing(logits, scores, expert_ids, weights, mask, sequence_ids, -(-tokens // SEQUENCE_LENGTH))


def route_call(
    balancer: Balancer,
    logits: Float[Tensor, "layers tokens experts"] | Sequence[Tensor],
    score_function: ScoreFunction,
    k: int = K,
    mask: Float[Tensor, " tokens"] | None = None,
) -> Call:
    bias = balancer.bias()
    return [
        route_layer(layer_logits, k, score_function, None if bias is None else bias[row], balancer.multiplies, mask)
        for row, layer_logits in enumerate(logits)
    ]


def take_tokens(routing: Routing, index: Tensor) -> Routing:
    """Some of the tokens, or all in another order."""
    parts = [None if value is None else value[index] for value in routing[:6]]
    sequence_ids = parts[5]
    if sequence_ids is not None and sequence_ids.numel():
        parts[5] = sequence_ids - sequence_ids.min()
    return Routing(*parts, routing.num_sequences)  # type: ignore[call-arg, arg-type]


def count_load(routing: Routing) -> Int[Tensor, " experts"]:
    counts = torch.nn.functional.one_hot(routing.expert_ids, routing.scores.shape[-1]).sum(1)
    if routing.mask is not None:
        counts = counts * (routing.mask != 0).long()[:, None]
    return counts.sum(0)


# ---- windows ----


def collect_window(balancer: Balancer, micro_batches: Sequence[Sequence[Call]]) -> tuple[Tensor, list[Tensor] | None]:
    """The arguments of ``update``: the load, and the statistic by layer."""
    statistics: dict[int, Tensor] = {}

    def add(row: int, value: Tensor) -> None:
        if row not in statistics:
            statistics[row] = value.clone()
        elif balancer.gathers:
            statistics[row] = torch.cat([statistics[row], value])
        else:
            statistics[row].add_(value)

    loads = []
    for calls in micro_batches:
        by_layer = zip(*calls, strict=True)
        loads.append(
            torch.stack([torch.stack([count_load(routing) for routing in routings]).sum(0) for routings in by_layer])
        )
        for call in calls:
            for row, routing in enumerate(call):
                statistic = balancer.statistic(routing, row)
                if statistic is not None:
                    add(row, statistic)
        micro_batch_statistic = balancer.micro_batch_statistic(loads[-1])
        for row, value in enumerate(() if micro_batch_statistic is None else micro_batch_statistic):
            add(row, value)
    return torch.stack(loads).sum(0), [statistics[row] for row in sorted(statistics)] or None


def close_window(
    balancer: Balancer, micro_batches: Sequence[Sequence[Call]], window: int = 0
) -> Int[Tensor, "layers experts"]:
    """Collects and updates; returns the load."""
    load, statistic = collect_window(balancer, micro_batches)
    balancer.update(load, statistic, window)
    return load


def train(balancer: Balancer, score_function: ScoreFunction, windows: Sequence[int], k: int = K) -> None:
    """Windows of two micro-batches. The number of a window is the seed of its tokens."""
    for window in windows:
        logits = random_logits(100 + window).to(get_bias(balancer).dtype)
        micro_batches = [[route_call(balancer, part, score_function, k)] for part in logits.chunk(2, dim=1)]
        close_window(balancer, micro_batches, window)


# ---- bias and state ----


def get_bias(balancer: Balancer) -> Float[Tensor, "layers experts"]:
    bias = balancer.bias()
    if bias is None:
        raise NotApplicable
    return bias


def get_state(balancer: Balancer) -> dict[str, Tensor]:
    """The tensors that ``update`` moves: bias and state."""
    return {"bias": get_bias(balancer), **balancer.state()}


def clone_state(balancer: Balancer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in get_state(balancer).items()}


def require_same_state(state: dict[str, Tensor], expected: dict[str, Tensor], subject: str) -> None:
    require(
        state.keys() == expected.keys(), f"a state {subject} of {sorted(state)} where {sorted(expected)} was expected"
    )
    for name, value in state.items():
        require_same(value, expected[name], f"{name} {subject}:")
