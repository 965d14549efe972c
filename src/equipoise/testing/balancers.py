"""The invariants of a balancer, tried on random routers of every score function.

Windows are made as the library makes them: every call is routed by the bias as it is, counted, asked for its
statistic; a micro-batch is asked for its own; what is summed or put one after another reaches ``update``.
"""

import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise.balancers import Balancer, LayerStack, parse_strategy
from equipoise.balancers.base import POOLINGS, SCOPES
from equipoise.balancers.strategy import BALANCERS
from equipoise.routing import SCORE_FUNCTIONS, Routing, score
from equipoise.testing._common import PassedOver, case, close, fail, require, require_same, run

__all__ = ["BALANCER_INVARIANTS", "check_balancer"]

Factory = Callable[[], Balancer]
Call = list[Routing]  # of every layer
EXPERTS, K, LAYERS, TOKENS = 6, 2, 2, 48
SEQUENCE = 5  # tokens of a sequence


def check_balancer(
    factory: Factory, *, only: str | None = None, score_functions: Sequence[str] = SCORE_FUNCTIONS
) -> tuple[str, ...]:
    """Checks every invariant of one balancer, or ``only`` one; returns the names of those that have a meaning for it.

    Raises ``ConformanceError`` at the first that does not hold.

    Args:
        factory: makes the balancer, unprepared; called several times. A rate should be large enough to show within 200
            windows, small enough not to swing.
        only: one of ``BALANCER_INVARIANTS``.
        score_functions: those that it is for; default all.

    >>> from equipoise import ZLoss
    >>> check_balancer(ZLoss, only="loss derivative")
    ('loss derivative',)
    """
    if not callable(factory):
        raise TypeError(
            f"factory must be a function that makes a balancer, as `lambda: {type(factory).__name__}()`: got one that "
            "is made."
        )
    balancer = factory()
    if not isinstance(balancer, Balancer):
        raise TypeError(f"factory must make a Balancer: got {type(balancer).__name__}.")
    return run(
        _INVARIANTS,
        only,
        [
            ({"score_function": score_function, "experts": EXPERTS, "k": K}, (factory, score_function))
            for score_function in score_functions
        ],
    )


# ---- windows ----


def _new(
    factory: Factory, score_function: str, bias: Float[Tensor, "layers experts"] | None = None, k: int = K
) -> Balancer:
    """A prepared copy, as ``attach`` makes it."""
    balancer = deepcopy(factory())
    balancer.prepare(LayerStack(score_function, k, torch.zeros(LAYERS, EXPERTS) if bias is None else bias))
    return balancer


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _random_bias(seed: int = 7) -> Float[Tensor, "layers experts"]:
    """Of mean zero."""
    bias = 0.05 * torch.randn(LAYERS, EXPERTS, generator=_generator(seed), dtype=torch.float64)
    return (bias - bias.mean(-1, keepdim=True)).float()


def _logits(seed: int, tokens: int = TOKENS, experts: int = EXPERTS) -> Float[Tensor, "layers tokens experts"]:
    """Of routers that like some experts better, each layer others."""
    skew = torch.linspace(1, -1, experts)
    return torch.randn(LAYERS, tokens, experts, generator=_generator(seed)) + torch.stack([skew, skew.flip(0)])[:, None]


def _routing(
    logits: Float[Tensor, "tokens experts"],
    k: int,
    score_function: str,
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
    sequence_ids = torch.arange(tokens, device=logits.device) // SEQUENCE
    weights = scores.gather(-1, expert_ids).detach()
    return Routing(logits, scores, expert_ids, weights, mask, sequence_ids, -(-tokens // SEQUENCE))


def _route(
    balancer: Balancer,
    logits: Float[Tensor, "layers tokens experts"] | Sequence[Tensor],
    score_function: str,
    k: int = K,
    mask: Float[Tensor, " tokens"] | None = None,
) -> Call:
    bias = balancer.bias()
    return [
        _routing(layer, k, score_function, None if bias is None else bias[row], balancer.multiplies, mask)
        for row, layer in enumerate(logits)
    ]


def _take(routing: Routing, index: Tensor) -> Routing:
    """Some tokens, or the same in another order."""
    parts = [None if value is None else value[index] for value in routing[:6]]
    sequence_ids = parts[5]
    if sequence_ids is not None and sequence_ids.numel():
        parts[5] = sequence_ids - sequence_ids.min()
    return Routing(*parts, routing.num_sequences)  # type: ignore[call-arg, arg-type]


def _load(routing: Routing) -> Int[Tensor, " experts"]:
    counts = torch.nn.functional.one_hot(routing.expert_ids, routing.scores.shape[-1]).sum(1)
    if routing.mask is not None:
        counts = counts * (routing.mask != 0).long()[:, None]
    return counts.sum(0)


def _window(balancer: Balancer, micro_batches: Sequence[Sequence[Call]]) -> tuple[Tensor, list[Tensor] | None]:
    """What ``update`` gets: the load, and by layer the statistic."""
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
        loads.append(
            torch.stack(
                [torch.stack([_load(routing) for routing in layer]).sum(0) for layer in zip(*calls, strict=True)]
            )
        )
        for call in calls:
            for row, routing in enumerate(call):
                found = balancer.statistic(routing, row)
                if found is not None:
                    add(row, found)
        by_layer = balancer.micro_batch_statistic(loads[-1])
        for row, value in enumerate(() if by_layer is None else by_layer):
            add(row, value)
    return torch.stack(loads).sum(0), [statistics[row] for row in sorted(statistics)] or None


def _close(
    balancer: Balancer, micro_batches: Sequence[Sequence[Call]], window: int = 0
) -> Int[Tensor, "layers experts"]:
    load, statistic = _window(balancer, micro_batches)
    balancer.update(load, statistic, window)
    return load


def _train(balancer: Balancer, score_function: str, windows: Sequence[int], k: int = K) -> None:
    """Windows of two micro-batches with tokens of their own."""
    for window in windows:
        logits = _logits(100 + window).to(_bias(balancer).dtype)
        _close(balancer, [[_route(balancer, part, score_function, k)] for part in logits.chunk(2, dim=1)], window)


def _bias(balancer: Balancer) -> Float[Tensor, "layers experts"]:
    bias = balancer.bias()
    if bias is None:
        raise PassedOver
    return bias


def _state(balancer: Balancer) -> dict[str, Tensor]:
    """All that ``update`` moves."""
    return {"bias": _bias(balancer), **balancer.state()}


def _held(balancer: Balancer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in _state(balancer).items()}


def _require_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    require(found.keys() == expected.keys(), f"{what} has {sorted(found)} where {sorted(expected)} was expected")
    for name, value in found.items():
        require_same(value, expected[name], f"{name}, {what}:")


def _moves(factory: Factory) -> None:
    """Goes on only where a bias may move."""
    balancer = factory()
    if not balancer.has_bias or type(balancer).update is Balancer.update:
        raise PassedOver


# ---- what it is ----


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b or (type(a) is type(b) and hasattr(a, "__dict__") and _same(vars(a), vars(b)))


def _specification(factory: Factory, score_function: str) -> None:
    """A balancer must be a specification: using a prepared copy leaves it, and every other copy, as they were."""
    spec = factory()
    require(spec.scope in (*SCOPES, "token"), f"scope {spec.scope!r}, not one of {', '.join(SCOPES)}, token")
    require(spec.pooling in POOLINGS, f"pooling {spec.pooling!r}, not one of {', '.join(POOLINGS)}")
    require(math.isfinite(spec.coefficient), f"coefficient {spec.coefficient!r}, not a finite number")
    require(bool(spec.metric), "an empty metric: the logs have no name for it")
    require(spec.has_bias or spec.has_loss, "neither a bias nor a loss")
    before = deepcopy(vars(spec))
    other, used = deepcopy(spec), deepcopy(spec)
    for copy in (other, used):
        copy.prepare(LayerStack(score_function, K, torch.zeros(LAYERS, EXPERTS)))
    if used.has_bias:
        held = _held(other)
        _train(used, score_function, range(3))
        _require_same(_held(other), held, "of another copy that was not used")
    notes = used.notes(100)
    sentences = isinstance(notes, list) and all(isinstance(note, str) for note in notes)
    require(sentences, f"notes(100) gave {notes!r}, not a list of sentences")
    require(_same(vars(spec), before), f"the specification became {vars(spec)}; it was {before}")


def _copies(factory: Factory, score_function: str) -> None:
    """A deepcopy and a pickle of a balancer, prepared or not, must go on alike and apart from the original."""

    def pickled(balancer: Balancer) -> Balancer:
        return pickle.loads(pickle.dumps(balancer))

    for way, copy_of in (("deepcopy", deepcopy), ("pickle", pickled)):
        with case(copied_by=way):
            require(str(copy_of(factory())) == str(factory()), "another strategy string from the copy")
            balancer = _new(factory, score_function)
            if not balancer.has_bias:
                require(_same(vars(copy_of(balancer)), vars(balancer)), "another state in the copy")
                continue
            _train(balancer, score_function, range(2))
            held, copy = _held(balancer), copy_of(balancer)
            _train(copy, score_function, range(2, 4))
            _require_same(_held(balancer), held, "of the original, while only the copy was used")
            _train(balancer, score_function, range(2, 4))
            _require_same(_held(copy), _held(balancer), "of the copy, after the same windows as the original")


def _strategy_string(factory: Factory, score_function: str) -> None:
    """str(balancer) must be the same for the same options, and make it again if its name is registered."""
    spec = factory()
    text, again = str(spec), str(factory())
    require(text == again and " at 0x" not in text, f"{text!r} and {again!r} from two calls of the factory")
    if BALANCERS.get(spec.name) is not type(spec):
        return
    made = parse_strategy(text)
    require(len(made) == 1 and type(made[0]) is type(spec), f"{text!r}, which makes {made}")
    require(_same(vars(made[0]), vars(spec)), f"{text!r}, which makes {vars(made[0])} of {vars(spec)}")
    require(str(made[0]) == text, f"{text!r}, which comes back as {str(made[0])!r}")


# ---- the bias ----


def _bias_is_the_state(factory: Factory, score_function: str) -> None:
    """bias() must be one float32 tensor [layers, experts] that starts at LayerStack.bias, is moved in place and has no
    gradient; what state() holds likewise, from zero."""
    given = _random_bias()
    start = given.clone()
    balancer = _new(factory, score_function, given)
    held = _state(balancer)
    bias = held["bias"]
    require_same(bias, start, "at the start")
    for name, value in held.items():
        require(value.shape == start.shape, f"{name} of shape {tuple(value.shape)}, not {tuple(start.shape)}")
        require(not value.requires_grad, f"{name} requires a gradient")
        require(name == "bias" or not value.any(), f"the state {name} is not zero at the start")
    _train(balancer, score_function, range(3))
    for name, value in _state(balancer).items():
        require(value is held.get(name), f"another tensor from {name} after an update: it was not moved in place")
        require(value.dtype == start.dtype, f"{name} became {value.dtype}")
    require(torch.equal(given, start), "LayerStack.bias itself was moved: other balancers share it")
    bias.fill_(0.25)
    require((_bias(balancer) == 0.25).all(), "what is written into bias() is not there afterwards")


def _float64(factory: Factory, score_function: str) -> None:
    """With a float64 LayerStack.bias all that moves must be, and stay, float64."""
    if not factory().has_bias:
        raise PassedOver
    balancer = _new(factory, score_function, _random_bias().double())
    for moment in ("at the start", "after three windows"):
        for name, value in _state(balancer).items():
            require(value.dtype == torch.float64, f"{name} is {value.dtype} {moment}")
        _train(balancer, score_function, range(3))


def _resumes(factory: Factory, score_function: str) -> None:
    """bias() and state() must be all that update moves: written back, the balancer goes on as if it never stopped."""
    _moves(factory)
    balancer = _new(factory, score_function)
    _train(balancer, score_function, range(3))
    saved = _held(balancer)
    _train(balancer, score_function, range(3, 6))
    expected = _held(balancer)
    for what, resumed in (("a new copy", _new(factory, score_function)), ("the same one moved back", balancer)):
        state = _state(resumed)
        require(state.keys() == saved.keys(), f"{what} has the state {sorted(state)}, not {sorted(saved)}")
        for name, value in state.items():
            value.copy_(saved[name])
        _train(resumed, score_function, range(3, 6))
        _require_same(_held(resumed), expected, f"of {what}, after windows 3 to 5")


# ---- what reaches update ----


def _statistic(factory: Factory, score_function: str) -> None:
    """A statistic must be int64 (if gathered: one row a token, of any dtype), of a shape that depends on no data, in
    memory of its own."""
    kind = type(factory())
    if (kind.statistic, kind.micro_batch_statistic) == (Balancer.statistic, Balancer.micro_batch_statistic):
        raise PassedOver
    balancer = _new(factory, score_function)
    of_calls: set[Any] = set()
    of_micro_batches: set[Any] = set()
    for tokens, masked in ((TOKENS, False), (7, False), (7, True), (1, False), (0, False)):
        with case(tokens=tokens, all_masked=masked):
            call = _route(balancer, _logits(1, tokens), score_function, mask=torch.zeros(tokens) if masked else None)
            for row, routing in enumerate(call):
                found = balancer.statistic(routing, row)
                if found is None:
                    of_calls.add(None)
                    continue
                of_calls.add(tuple(found.shape)[1 if balancer.gathers else 0 :])
                require(not balancer.gathers or found.shape[0] == tokens, f"shape {tuple(found.shape)}")
                require(balancer.gathers or found.dtype == torch.int64, f"{found.dtype}, whose sums may round")
                require(not found.requires_grad, "a statistic that requires a gradient")
                kept = found.clone()
                balancer.statistic(_routing(-routing.logits, K, score_function), row)
                require(torch.equal(found, kept), "a statistic that changed with the next call: the same memory")
                found.add_(1)
                again = balancer.statistic(routing, row)
                same = again is not None and torch.equal(again, kept)
                require(same, "another statistic after the first was added to: its memory is used for something else")
            by_layer = balancer.micro_batch_statistic(torch.stack([_load(routing) for routing in call]))
            of_micro_batches.add(None if by_layer is None else tuple(by_layer.shape)[1:])
            if by_layer is not None:
                require(by_layer.dtype == torch.int64, f"{by_layer.dtype} of a micro-batch, whose sums may round")
                require(by_layer.shape[0] == LAYERS, f"shape {tuple(by_layer.shape)} for {LAYERS} layers")
    for hook, shapes in (("statistic", of_calls), ("micro_batch_statistic", of_micro_batches)):
        require(len(shapes) == 1, f"{hook} of the shapes {shapes} for calls with more, few, masked and no tokens")
    both = (of_calls | of_micro_batches) - {None}
    if not both:
        raise PassedOver
    require(len(both) == 1, f"shapes {both} from statistic and micro_batch_statistic, which are added up")


def _inputs(factory: Factory, score_function: str) -> None:
    """No hook may change what it is given: routing, load, statistics."""
    balancer = _new(factory, score_function)
    mask = torch.ones(TOKENS)
    mask[:5] = 0
    call = _route(balancer, _logits(1), score_function, mask=mask)
    load, statistic = _window(balancer, [[call]])
    given = (call, load, statistic)
    hooks: dict[str, Callable[[], object]] = {
        "statistic": lambda: balancer.statistic(call[0], 0),
        "micro_batch_statistic": lambda: balancer.micro_batch_statistic(load),
        "loss": lambda: balancer.loss(call[0], _scope_load(balancer, call[0], POOLED)),
        "update": lambda: balancer.update(load, statistic, 0),
    }
    for hook, use in hooks.items():
        kept = deepcopy(given)
        with case(hook=hook, tokens=TOKENS):
            use()
            for after, before in zip(tree_leaves(given), tree_leaves(kept), strict=True):
                if isinstance(after, Tensor):
                    require_same(after, before, "an input that became")


# ---- what update does ----


def _windows_at_the_edge() -> Iterator[tuple[str, Float[Tensor, "layers tokens experts"], Tensor | None, int]]:
    """(name, logits, mask, k)"""
    order = torch.arange(EXPERTS, dtype=torch.float32)
    same = order.flip(0).expand(LAYERS, TOKENS, EXPERTS)
    yield "no tokens", _logits(1, 0), None, K
    yield "all tokens masked", _logits(1), torch.zeros(TOKENS), K
    yield "one token", _logits(1, 1), None, K
    yield "all tokens to one expert", 50 * same, None, 1
    yield "k = experts", _logits(1), None, EXPERTS
    yield "ties: all logits 0", torch.zeros(LAYERS, TOKENS, EXPERTS), None, K
    yield "a dead expert", torch.where(order == 0, -1e4, _logits(1)), None, K
    yield "logits of 1e4", 1e4 * _logits(1), None, K
    yield "logits of -1e4", _logits(1) - 1e4, None, K


def _finite(factory: Factory, score_function: str) -> None:
    """Bias and state must stay finite for any window, and a factor 1 + bias must not fall below 0."""
    _moves(factory)
    for name, logits, mask, k in _windows_at_the_edge():
        for start in (torch.zeros(LAYERS, EXPERTS), _random_bias()):
            with case(window=name, logits=tuple(logits.shape), k=k):
                balancer = _new(factory, score_function, start, k)
                for window in range(3):
                    _close(balancer, [[_route(balancer, logits, score_function, k, mask)]], window)
                    for what, value in _state(balancer).items():
                        require(value.isfinite().all(), f"{what} {value.tolist()}")
                    factor = 1 + _bias(balancer)
                    require(not balancer.multiplies or factor.min() >= 0, f"a factor of {factor.min().item():.9g}")


def _huge_counts(factory: Factory, score_function: str) -> None:
    """Counts above 2^24 and 2^31 must move the bias the way that the same shares of few tokens move it."""
    _moves(factory)
    balancer = _new(factory, score_function)
    load, statistic = _window(balancer, [[_route(balancer, _logits(3), score_function)]])
    if statistic is not None and balancer.gathers:
        raise PassedOver  # such counts cannot come from statistics that are kept token by token
    expected: Tensor | None = None
    for times in (1, 2**20 + 1, 2**24 + 1, 2**29, 2**31 + 1, 2**40):
        with case(counts=f"of {TOKENS} tokens times {times}", seed=3):
            copy = _new(factory, score_function)
            copy.update(load * times, None if statistic is None else [value * times for value in statistic], 0)
            require(all(value.isfinite().all() for value in _state(copy).values()), "a bias that is not finite")
            bias = _bias(copy)
            busy, idle = (bias.gather(1, i.unsqueeze(1)) for i in (load.argmax(-1), load.argmin(-1)))
            found = (busy - idle).sign()
            expected = found if expected is None else expected
            require(
                torch.equal(found, expected),
                f"the busiest expert moved by the sign {found.flatten().tolist()} against the idlest, by layer; with "
                f"few tokens {expected.flatten().tolist()}",
            )


def _no_tokens(factory: Factory, score_function: str) -> None:
    """A window without unmasked tokens must move nothing from a state of zero."""
    _moves(factory)
    for name, tokens, mask in (("no tokens", 0, None), ("all tokens masked", TOKENS, torch.zeros(TOKENS))):
        for start in (torch.zeros(LAYERS, EXPERTS), _random_bias()):
            balancer = _new(factory, score_function, start.clone())
            with case(window=name):
                _close(balancer, [[_route(balancer, _logits(1, tokens), score_function, mask=mask)]])
                require_same(_bias(balancer), start, "a bias that moved to", atol=1e-6)


def _even_load(factory: Factory, score_function: str) -> None:
    """An even load must move no expert against another from a state of zero, where the load alone decides."""
    _moves(factory)
    if type(factory()).statistic is not Balancer.statistic:
        raise PassedOver
    balancer = _new(factory, score_function)
    load = torch.full((LAYERS, EXPERTS), 7)
    by_layer = balancer.micro_batch_statistic(load)
    balancer.update(load, None if by_layer is None else list(by_layer), 0)
    bias = _bias(balancer)
    with case(load="7 for every expert"):
        require((bias == bias[:, :1]).all(), f"the bias {bias.tolist()}")


def _layers(factory: Factory, score_function: str) -> None:
    """A layer's bias must depend on that layer alone: on no other's load, number of tokens, statistic or bias."""
    _moves(factory)
    for row in range(LAYERS):
        found = []
        for seed, tokens in ((1, TOKENS), (2, TOKENS // 8)):
            logits, start = list(_logits(seed, tokens)), _random_bias(seed)
            logits[row], start[row] = _logits(3)[row], _random_bias(3)[row]
            balancer = _new(factory, score_function, start)
            for window in range(2):
                _close(balancer, [[_route(balancer, logits, score_function)]], window)
            found.append({name: value[row].clone() for name, value in _state(balancer).items()})
        with case(layer=row, seed_of_the_others="2 after 1", tokens_of_the_others=f"{TOKENS // 8} after {TOKENS}"):
            _require_same(found[1], found[0], "when another layer changed")


def _update_permutes(factory: Factory, score_function: str) -> None:
    """Experts in another order must give the same biases in that order. Where only some tokens are looked at, this is
    asked of those that are looked at in both orders."""
    _moves(factory)
    order, tokens = torch.randperm(EXPERTS, generator=_generator(4)), TOKENS
    start = _random_bias()

    def call(logits: Tensor, order: Tensor, kept: Sequence[Tensor] | None = None) -> tuple[Balancer, Call]:
        balancer = _new(factory, score_function, start[:, order].clone())
        routed = _route(balancer, logits[..., order], score_function)
        if kept is not None:
            routed = [_take(routing, index) for routing, index in zip(routed, kept, strict=True)]
        return balancer, routed

    def moved(balancer: Balancer, routed: Call) -> Tensor:
        _close(balancer, [[routed]])
        return _bias(balancer)

    same = torch.arange(EXPERTS)
    for seed in (5, 6):
        with case(seed=seed, tokens=tokens, order=order.tolist()):
            logits = _logits(seed, tokens)
            expected, found = moved(*call(logits, same)), moved(*call(logits, order))
            if not close(found, expected[:, order], 1e-5, 1e-6):
                seen = [_looked_at(*call(logits, way)) for way in (same, order)]
                both = [(a & b).nonzero()[:, 0] for a, b in zip(*seen, strict=True)]
                expected, found = moved(*call(logits, same, both)), moved(*call(logits, order, both))
            require_same(found, expected[:, order], "a bias of", rtol=1e-5, atol=1e-6)


def _looked_at(balancer: Balancer, routed: Call) -> list[Bool[Tensor, " tokens"]]:
    """By layer, the tokens whose statistic is another than a masked token's; all, where there is no statistic."""
    seen = []
    for row, routing in enumerate(routed):
        tokens = []
        for index in range(routing.logits.shape[0]):
            one = _take(routing, torch.tensor([index]))
            found, masked = (balancer.statistic(one._replace(mask=torch.tensor([m])), row) for m in (1.0, 0.0))
            tokens.append(found is None or masked is None or not torch.equal(found, masked))
        seen.append(torch.tensor(tokens))
    return seen


def _deterministic(factory: Factory, score_function: str) -> None:
    """The same windows must give the same biases bit for bit, whatever the global random generator holds, and leave
    that generator as it is."""
    _moves(factory)
    found = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]), case(global_seed=seed):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            balancer = _new(factory, score_function)
            _train(balancer, score_function, range(3))
            found.append(_held(balancer))
            _require_same(found[-1], found[0], "after three windows")
            require(torch.equal(torch.get_rng_state(), before), "the global generator was used")


def _division(factory: Factory, score_function: str) -> None:
    """However a window's tokens are dealt to calls, micro-batches and ranks, in any order, the bias must be the same.
    Where each micro-batch has a say of its own, micro-batches stay whole."""
    _moves(factory)
    fresh = _new(factory, score_function, _random_bias())
    whole = _route(fresh, _logits(8), score_function)
    empty = [_take(routing, torch.arange(0)) for routing in whole]

    def cut(index: Tensor, *ends: int) -> list[Call]:
        return [[_take(routing, part) for routing in whole] for part in index.tensor_split(ends)]

    first, second, third = cut(torch.arange(TOKENS), 10, 25)
    shuffled = torch.randperm(TOKENS, generator=_generator(9))
    ways: dict[str, list[list[Call]]]
    if fresh.micro_batch_statistic(torch.ones(LAYERS, EXPERTS, dtype=torch.int64)) is not None:
        ways = {
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
        ways = {
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
    for name, micro_batches in ways.items():
        with case(dealt_as=name, not_as=next(iter(ways)), tokens=TOKENS, seed=8):
            balancer = _new(factory, score_function, _random_bias())
            _close(balancer, micro_batches)
            found = _bias(balancer)
            expected = found if expected is None else expected
            require_same(found, expected, "a bias of", rtol=1e-6 if balancer.gathers else 0)


def _update_masked(factory: Factory, score_function: str) -> None:
    """A window with masked tokens must give what it gives without them, whatever they hold."""
    _moves(factory)
    mask = (torch.rand(TOKENS, generator=_generator(10)) < 0.6).float()
    logits = _logits(11)
    logits[:, mask == 0] = 1e4 * _logits(12)[:, mask == 0]
    balancer, other = (_new(factory, score_function, _random_bias()) for _ in range(2))
    masked = _route(balancer, logits, score_function, mask=mask)
    sliced = [_take(routing, mask.nonzero()[:, 0])._replace(mask=None) for routing in masked]
    _close(balancer, [[masked]])
    _close(other, [[sliced]])
    with case(seed=11, tokens=TOKENS, masked=int((mask == 0).sum())):
        _require_same(_held(balancer), _held(other), "with masked tokens")


def _direction(factory: Factory, score_function: str) -> None:
    """Against a skewed router the busiest expert's bias must fall relative to the idlest's in the first window, and
    the max violation must fall within 200 windows."""
    _moves(factory)
    experts, tokens = 8, 256
    logits = _logits(13, tokens, experts)
    balancer = deepcopy(factory())
    balancer.prepare(LayerStack(score_function, K, torch.zeros(LAYERS, experts)))
    history: list[Tensor] = []
    with case(seed=13, layers=LAYERS, tokens=tokens, experts=experts):
        for window in range(200):
            load = _close(balancer, [[_route(balancer, logits, score_function)]], window)
            history.append(load.amax(-1) / load.double().mean(-1) - 1)
            if window == 0:
                bias = _bias(balancer)
                busy, idle = (bias.gather(1, i.unsqueeze(1)) for i in (load.argmax(-1), load.argmin(-1)))
                apart = (busy - idle).flatten().tolist()
                require((busy < idle).all(), f"a bias that moved the busiest by {apart} against the idlest, by layer")
            first, last = history[0], torch.stack(history[-10:]).mean(0)
            if (last < first / 2).all():
                return
        require(
            (last < first).all(),
            f"a max violation of {last.tolist()} by layer at the end, of {first.tolist()} at the start",
        )


# ---- the loss ----

LOSS_TOKENS = 4 * SEQUENCE
POOLED = torch.tensor([31, 5, 0, 17, 9, 2])  # what others of the global batch have counted


def _has_loss(factory: Factory) -> None:
    if not factory().has_loss:
        raise PassedOver


def _scope_load(balancer: Balancer, routing: Routing, pooled: Tensor) -> Int[Tensor, " experts"] | None:
    """The load that a balancer of this scope is given, when the others of the global batch counted ``pooled``."""
    if balancer.scope in ("sequence", "token"):
        return None
    return _load(routing) + (pooled if balancer.scope == "global_batch" else 0)


def _value(balancer: Balancer, routing: Routing, load: Tensor | None) -> Float[Tensor, ""]:
    value = balancer.loss(routing, load)
    require(isinstance(value, Tensor) and value.dim() == 0, f"{value!r}, not a scalar tensor")
    assert value is not None
    return value


def _gradient(value: Tensor, logits: Tensor) -> Float[Tensor, "tokens experts"]:
    require(value.requires_grad, "a loss without a gradient")
    (gradient,) = torch.autograd.grad(value, logits, retain_graph=True, allow_unused=True)
    require(gradient is not None, "a loss that does not depend on routing.logits")
    return gradient


class LossCase(NamedTuple):
    given: dict[str, object]  # for errors
    balancer: Balancer
    routing: Routing  # one layer's call
    load: Tensor | None  # of the balancer's scope


def _losses(factory: Factory, score_function: str, dtype: torch.dtype = torch.float64) -> list[LossCase]:
    """Without a mask and with one."""
    _has_loss(factory)
    cases = []
    for seed, masked in ((21, False), (22, True)):
        balancer = _new(factory, score_function)
        logits = _logits(seed, LOSS_TOKENS)[0].to(dtype).requires_grad_()
        mask = (torch.rand(LOSS_TOKENS, generator=_generator(seed)) < 0.7).float() if masked else None
        routing = _routing(logits, K, score_function, mask=mask)
        given = dict(seed=seed, tokens=LOSS_TOKENS, masked=masked, dtype=dtype)
        cases.append(LossCase(given, balancer, routing, _scope_load(balancer, routing, POOLED)))
    return cases


def _loss_finite(factory: Factory, score_function: str) -> None:
    """The loss must be a finite scalar with a finite gradient for any logits, and without unmasked tokens both 0."""
    _has_loss(factory)
    logits = _logits(20, LOSS_TOKENS)[0]
    calls = {
        "logits of 0": torch.zeros_like(logits),
        "logits of 1e4": 1e4 * logits,
        "logits of -95": logits - 95,  # sigmoid scores are denormal
        "logits of -1e4": logits - 1e4,
        "a logit of -1e4": torch.where(torch.arange(EXPERTS) == 0, -1e4, logits),
        "one token": logits[:1],
        "no tokens": logits[:0],
        "all tokens masked": logits,
    }
    for name, values in calls.items():
        balancer, values = _new(factory, score_function), values.clone().requires_grad_()
        mask = torch.zeros(values.shape[0]) if name == "all tokens masked" else None
        routing = _routing(values, K, score_function, mask=mask)
        for others in (0, 1, 2**40):
            with case(call=name, logits=tuple(values.shape), counts_elsewhere=others * int(POOLED.sum())):
                value = _value(balancer, routing, _scope_load(balancer, routing, others * POOLED))
                gradient = _gradient(value, values)
                require(value.isfinite(), f"a loss of {value.item()}")
                require(gradient.isfinite().all(), "a gradient that is not finite")
                if name in ("no tokens", "all tokens masked"):
                    require(value == 0, f"a loss of {value.item()}")
                    require(not gradient.any(), "a gradient that is not 0")


def _loss_by_logits(factory: Factory, score_function: str) -> None:
    """The loss must have a gradient through routing.logits only: weights and counts are there to be read."""
    for given, balancer, routing, load in _losses(factory, score_function):
        with case(**given):
            weights = routing.weights.clone().requires_grad_()
            value = _value(balancer, routing._replace(weights=weights), load)
            require(_gradient(value, routing.logits).any(), "a gradient of 0 everywhere")
            (found,) = torch.autograd.grad(value, weights, allow_unused=True)
            require(found is None or not found.any(), "a gradient through routing.weights")


def _loss_derivative(factory: Factory, score_function: str) -> None:
    """In float64 the gradient must equal central differences in random directions, with choice and load held."""
    step = 1e-5
    for given, balancer, routing, load in _losses(factory, score_function):
        gradient = _gradient(_value(balancer, routing, load), routing.logits)
        for seed in range(8):
            direction = torch.randn(gradient.shape, generator=_generator(seed), dtype=torch.float64)
            with case(**given, seed_of_the_direction=seed):
                values = []
                for way in (step, -step):
                    logits = routing.logits.detach() + way * direction
                    values.append(
                        _value(balancer, routing._replace(logits=logits, scores=score(logits, score_function)), load)
                    )
                expected = (values[0] - values[1]).detach() / (2 * step)
                found = (gradient * direction).sum()
                require(close(found, expected, 1e-6, 1e-8), f"{found.item()}, by differences {expected.item()}")


def _loss_masked(factory: Factory, score_function: str) -> None:
    """Masked tokens must get no gradient, and the loss must be that of the others alone, whatever the masked hold."""
    for given, balancer, routing, load in _losses(factory, score_function):
        if routing.mask is None:
            continue
        kept = routing.mask.nonzero()[:, 0]
        expected = _value(balancer, _take(routing, kept)._replace(mask=None), load)
        wanted = _gradient(expected, routing.logits)
        for factor in (1.0, 1e3):
            with case(**given, logits_of_masked_tokens=f"times {factor:g}"):
                logits = torch.where(routing.mask[:, None] == 0, factor * routing.logits, routing.logits).detach()
                logits.requires_grad_()
                value = _value(balancer, routing._replace(logits=logits, scores=score(logits, score_function)), load)
                gradient = _gradient(value, logits)
                require(not gradient[routing.mask == 0].any(), "a gradient at masked tokens")
                require(close(value, expected, 1e-12, 1e-14), f"a loss of {value.item()}, alone {expected.item()}")
                require_same(gradient, wanted, "a gradient of", rtol=1e-10, atol=1e-14)


def _loss_mean(factory: Factory, score_function: str) -> None:
    """The loss must be a mean over unmasked tokens: the parts of a call, weighed by their tokens, give the whole, by
    the same load. Where each sequence has a loss of its own, sequences stay whole."""
    for given, balancer, routing, load in _losses(factory, score_function):
        whole = _value(balancer, routing, load).detach()
        mask = torch.ones(LOSS_TOKENS) if routing.mask is None else routing.mask
        for size in (SEQUENCE, 3 * SEQUENCE, *(() if balancer.scope == "sequence" else (1, 7))):
            with case(**given, tokens_of_a_part=size):
                total = torch.zeros((), dtype=torch.float64)
                for part in torch.arange(LOSS_TOKENS).split(size):
                    total += mask[part].sum() * _value(balancer, _take(routing, part), load).detach()
                mean = total / mask.sum()
                require(close(mean, whole, 1e-10, 1e-12), f"{mean.item()} from the parts, {whole.item()} as a whole")


def _loss_permutes(factory: Factory, score_function: str) -> None:
    """Experts in another order must give the same loss."""
    order = torch.randperm(EXPERTS, generator=_generator(4))
    for given, balancer, routing, load in _losses(factory, score_function):
        permuted = routing._replace(
            logits=routing.logits[:, order],
            scores=routing.scores[:, order],
            expert_ids=order.argsort()[routing.expert_ids],
        )
        with case(**given, order=order.tolist()):
            value = _value(balancer, routing, load)
            found = _value(balancer, permuted, None if load is None else load[order])
            require(close(found, value, 1e-10, 1e-12), f"{found.item()}, in the first order {value.item()}")


def _loss_dtype(factory: Factory, score_function: str) -> None:
    """The loss must be float32 for logits of 16 bits and float32, float64 for float64."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for given, balancer, routing, load in _losses(factory, score_function, dtype):
            with case(**given):
                value, expected = _value(balancer, routing, load), torch.promote_types(dtype, torch.float32)
                require(value.dtype == expected, f"{value.dtype}, not {expected}")
                require(_gradient(value, routing.logits).isfinite().all(), "a gradient that is not finite")


def _loss_without_coefficient(factory: Factory, score_function: str) -> None:
    """loss() must leave the coefficient out: the library multiplies by it."""
    for given, balancer, routing, load in _losses(factory, score_function):
        larger = deepcopy(balancer)
        try:
            larger.coefficient = 3 * balancer.coefficient + 1
        except AttributeError:  # a property
            raise PassedOver from None
        with case(**given, coefficient=larger.coefficient):
            found, expected = _value(larger, routing, load), _value(balancer, routing, load)
            require(found == expected, f"{found.item()}, with {balancer.coefficient} {expected.item()}")


# ---- on the device ----


class _NoTransfer(TorchDispatchMode):
    """Refuses what a tensor of the host and one of the device do together, except a scalar of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, output)) if isinstance(leaf, Tensor)]
        asynchronous = (kwargs or {}).get("non_blocking", False)
        if len({tensor.device.type for tensor in tensors if tensor.dim()}) > 1 and not asynchronous:
            fail(f"{func}, which copies between host and device and waits for it")
        if func.overloadpacket in (torch.ops.aten.index_put, torch.ops.aten.index_put_) and args[2].numel() > 1:
            masks = [index for index in args[1] if index is not None and index.dtype == torch.bool]
            require(not masks, f"{func} by a mask, whose size the host must know")
        return output


class _NoUpload(TorchFunctionMode):
    """Refuses to make a tensor of the device from Python numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and output.device.type == "meta":
            fail(f"{func.__name__} of Python numbers on the device, which waits for the copy")
        return output


def _no_synchronisation(factory: Factory, score_function: str) -> None:
    """Statistics, loss, its backward and update must never make the host wait for the device: nothing may depend on a
    tensor's values (item, nonzero, bincount, a mask as an index) or be copied from one to the other. It is tried on
    tensors without values (device meta)."""
    for dtype, mask in ((torch.float32, None), (torch.bfloat16, torch.ones(LOSS_TOKENS, device="meta"))):
        balancer = _new(factory, score_function, torch.zeros(LAYERS, EXPERTS, device="meta"))
        logits = torch.zeros(LAYERS, LOSS_TOKENS, EXPERTS, dtype=dtype, device="meta").requires_grad_()
        load = torch.ones(LAYERS, EXPERTS, dtype=torch.int64, device="meta")
        given = dict(layers=LAYERS, tokens=LOSS_TOKENS, dtype=dtype, masked=mask is not None)
        call = _route(balancer, logits, score_function, mask=mask)
        with case(**given), _NoUpload(), _NoTransfer():
            with case(hook="statistic"):
                found = [balancer.statistic(routing, row) for row, routing in enumerate(call)]
            with case(hook="micro_batch_statistic"):
                by_layer = balancer.micro_batch_statistic(load)
            if balancer.has_loss:
                with case(hook="loss and its backward"):
                    value = balancer.loss(call[0], None if balancer.scope in ("sequence", "token") else load[0])
                    assert value is not None
                    value.backward()
            statistic = [value for value in (found if by_layer is None else by_layer) if value is not None]
            with case(hook="update"), torch.no_grad():
                balancer.update(load, statistic or None, 0)


_INVARIANTS: dict[str, Callable[[Factory, str], None]] = {
    "specification": _specification,
    "copies": _copies,
    "strategy string": _strategy_string,
    "bias is the state": _bias_is_the_state,
    "float64 stays": _float64,
    "resumes from its state": _resumes,
    "statistic": _statistic,
    "inputs unchanged": _inputs,
    "finite": _finite,
    "huge counts": _huge_counts,
    "no tokens move nothing": _no_tokens,
    "even load moves nothing": _even_load,
    "layers do not mix": _layers,
    "experts permute": _update_permutes,
    "deterministic": _deterministic,
    "any division of the tokens": _division,
    "masked tokens do not matter": _update_masked,
    "moves against the load": _direction,
    "loss finite": _loss_finite,
    "loss gradient by the logits only": _loss_by_logits,
    "loss derivative": _loss_derivative,
    "loss of masked tokens": _loss_masked,
    "loss is a mean over tokens": _loss_mean,
    "loss permutes": _loss_permutes,
    "loss dtype": _loss_dtype,
    "loss without its coefficient": _loss_without_coefficient,
    "no host synchronisation": _no_synchronisation,
}
BALANCER_INVARIANTS: tuple[str, ...] = tuple(_INVARIANTS)
