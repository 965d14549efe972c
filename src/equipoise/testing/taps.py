"""The invariants of a model under ``attach``, tried on copies of it.

What a router decided is recorded by a forward hook of our own and counted by hand; the loss-balancing gradient is that
of a formula written here, by autograd through the model without equipoise.
"""

import inspect
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from equipoise.attachment import attach
from equipoise.balance import Balance
from equipoise.balancers import Balancer, Frozen, LoadBalancingLoss, LossFree
from equipoise.errors import EquipoiseError
from equipoise.routers.find import find_routers
from equipoise.routers.tap import RouterKind
from equipoise.routing import route, score
from equipoise.testing._common import PassedOver, case, fail, require, require_same, run

__all__ = ["TAP_INVARIANTS", "check_tap"]

Where = Callable[[str, nn.Module], bool]


def check_tap(
    model: nn.Module, batch: Mapping[str, Any] | None = None, *, only: str | None = None, where: Where | None = None
) -> tuple[str, ...]:
    """Checks every invariant of one model under ``attach``, or ``only`` one; returns the names of those that have a
    meaning for it.

    Raises ``ConformanceError`` at the first that does not hold. Works on copies: the model stays as it is.

    Args:
        model: any model that ``attach`` accepts, with gates that are not flat. In training mode two runs with the same
            seed must give the same bits.
        batch: keyword arguments of the model's forward; its output must be a tensor or have a ``loss`` or ``logits``.
            Default: random ``input_ids`` (2, 16) below ``model.config.vocab_size``, and ``labels`` like them.
        only: one of ``TAP_INVARIANTS``.
        where: ``where(name, router) -> bool``, as for ``attach``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}.")
    if any("_equipoise" in module.__dict__ for module in model.modules()):
        raise ValueError(
            "model must be as it is before attach: this one is attached, or a copy of one that is. Call detach() on "
            "its Balance first, or build it anew."
        )
    subject = Subject(model, _random_batch(model) if batch is None else dict(batch), where)
    shapes = {name: tuple(value.shape) for name, value in subject.batch.items() if isinstance(value, Tensor)}
    given: dict[str, object] = {"model": type(model).__name__, "batch": shapes}
    return run(_INVARIANTS, only, [(given, (subject,))])


def _random_batch(model: nn.Module) -> dict[str, Tensor]:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ValueError(
            f"batch must be given for a model without config.vocab_size: got none for a {type(model).__name__}. Pass "
            "the keyword arguments of its forward."
        )
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    return {"input_ids": ids, "labels": ids} if "labels" in _arguments(model) else {"input_ids": ids}


def _arguments(model: nn.Module) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


class RouterCall(NamedTuple):
    """What one router got and gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    logits: Float[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens k"]
    expert_ids: Int[Tensor, "tokens k"]
    graph: bool  # not within a reentrant checkpoint, for instance

    @property
    def all_chosen(self) -> bool:
        return self.expert_ids.shape[-1] == self.logits.shape[-1]


@dataclass(frozen=True)
class Subject:
    """The model that is checked, and what it is called with."""

    model: nn.Module
    batch: dict[str, Any]
    where: Where | None

    def copy(self) -> nn.Module:
        model = deepcopy(self.model).train()
        model.zero_grad(set_to_none=True)
        return model

    def attached(self, *balancers: Balancer, biases: Mapping[str, Tensor] | None = None) -> tuple[nn.Module, Balance]:
        model = self.copy()
        return model, attach(model, *balancers, where=self.where, biases=biases)

    @property
    def flipped(self) -> dict[str, Any]:
        """Another batch: the sequences read backwards."""
        flip = {name: isinstance(value, Tensor) and value.dim() >= 2 for name, value in self.batch.items()}
        return {name: value.flip(1) if flip[name] else value for name, value in self.batch.items()}

    def routers(self, model: nn.Module) -> dict[str, tuple[nn.Module, RouterKind]]:
        found = find_routers(model)
        return {r.name: (r.module, r.kind) for r in found if self.where is None or self.where(r.name, r.module)}

    def record(self, model: nn.Module) -> dict[str, list[RouterCall]]:
        """By layer, every router call from now on."""
        calls: dict[str, list[RouterCall]] = {}
        for name, (router, kind) in self.routers(model).items():
            calls[name] = []

            def hook(
                module: Any,
                args: Any,
                kwargs: Any,
                output: Any,
                kept: list[RouterCall] = calls[name],
                kind: RouterKind = kind,
            ) -> None:
                logits, weights, expert_ids = kind.read(output, getattr(module, "top_k", None))
                kept.append(RouterCall(args, kwargs, logits, weights, expert_ids, torch.is_grad_enabled()))

            router.register_forward_hook(hook, with_kwargs=True)
        return calls

    def biases(self, spread: float) -> dict[str, Float[Tensor, " experts"]]:
        """Random biases in units of the standard deviation of each layer's scores."""
        model = self.copy()
        calls, biases = self.record(model), {}
        with torch.no_grad():
            _run(model, self.batch)
        for seed, (name, (_, kind)) in enumerate(self.routers(model).items()):
            deviation = kind.values(calls[name][0].logits).std().float().cpu()
            noise = torch.randn(calls[name][0].logits.shape[-1], generator=torch.Generator().manual_seed(seed))
            biases[name] = spread * deviation * noise
        return biases

    def favourites(self) -> dict[str, Float[Tensor, " experts"]]:
        """Biases by which one expert is always chosen."""
        return {
            name: torch.where(torch.arange(bias.numel()) == bias.numel() // 2, 100.0, 0.0)
            for name, bias in self.biases(0.0).items()
        }


@contextmanager
def _seeded() -> Iterator[None]:
    """The same dropout for every run; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _run(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Any, Float[Tensor, ""]]:
    """What comes out, and a scalar of it."""
    with _seeded():
        output = model(**batch)
    return output, _scalar(output)


def _scalar(output: Any) -> Float[Tensor, ""]:
    for value in (output, getattr(output, "loss", None), getattr(output, "logits", None)):
        if isinstance(value, Tensor):
            return value if value.dim() == 0 else value.square().mean()
    raise TypeError(f"the model must give a tensor, or something with a loss or logits: got {type(output).__name__}")


def _tensors(output: Any) -> list[Tensor]:
    return [_scalar(output), *(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))]


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _require_bits(found: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    require(len(found) == len(expected), f"{len(found)} {what} where {len(expected)} were expected")
    for a, b in zip(found, expected, strict=True):
        require_same(a, b, f"{what} of other bits:")


def _require_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    require(found.keys() == expected.keys(), f"gradients of {sorted(found.keys() ^ expected.keys())} on one side only")
    for name, value in found.items():
        _require_bits([value], [expected[name]], f"gradient of {name}")


def _require_near(
    found: dict[str, Tensor], expected: dict[str, Tensor], what: str, dtypes: Sequence[torch.dtype] = ()
) -> None:
    """By norm over all parameters, to the precision of the coarsest dtype."""
    names = found.keys() | expected.keys()
    size = torch.stack([expected[name].double().norm() for name in expected]).norm()
    apart = torch.stack([(_get(found, name, expected) - _get(expected, name, found)).norm() for name in names]).norm()
    coarsest = max(torch.finfo(dtype).eps for dtype in (*dtypes, *(value.dtype for value in expected.values())))
    rtol = 2e3 * coarsest  # sums over tokens, layers, channels
    worst = max(names, key=lambda name: float((_get(found, name, expected) - _get(expected, name, found)).norm()))
    require(size > 0, f"{what} of 0 everywhere: nothing can be compared")
    require(apart <= rtol * size, f"{what} that is {float(apart / size):.3g} of its norm away, most at {worst}")


def _get(values: dict[str, Tensor], name: str, others: dict[str, Tensor]) -> Tensor:
    return values[name].double() if name in values else torch.zeros_like(others[name], dtype=torch.float64)


def _drain(calls: dict[str, list[RouterCall]]) -> dict[str, list[RouterCall]]:
    """The calls since the last time."""
    kept = {name: list(values) for name, values in calls.items()}
    for values in calls.values():
        values.clear()
    return kept


def _count(calls: Sequence[RouterCall], mask: Tensor | None = None) -> Int[Tensor, " experts"]:
    """By hand: one count for each unmasked token and slot."""
    total = torch.zeros(calls[0].logits.shape[-1], dtype=torch.int64)
    for call in calls:
        ids = call.expert_ids if mask is None else call.expert_ids[mask.reshape(-1) != 0]
        total += torch.bincount(ids.reshape(-1).cpu(), minlength=total.numel())
    return total


def _num_tokens(calls: Sequence[RouterCall], mask: Tensor | None) -> int:
    """Unmasked tokens, once for each call."""
    return sum(len(call.expert_ids) if mask is None else int((mask != 0).sum()) for call in calls)


def _require_counts(load: Mapping[str, Tensor], calls: Mapping[str, Sequence[RouterCall]], batch: Any) -> None:
    for name, counts in load.items():
        require(calls[name], f"no call of {name} at all")
        expected = _count(calls[name], batch.get("attention_mask"))
        with case(layer=name):
            same = torch.equal(counts.cpu(), expected)
            require(same, f"a load of {counts.tolist()}, counted by hand {expected.tolist()}")


def _groups(router: nn.Module) -> dict[str, Any]:
    for groups, top in (("num_groups", "top_groups"), ("num_group", "topk_group"), ("n_group", "topk_group")):
        if isinstance(getattr(router, groups, None), int) and isinstance(getattr(router, top, None), int):
            return {"num_groups": getattr(router, groups), "top_groups": getattr(router, top)}
    return {}


def _require_choice(call: RouterCall, router: nn.Module, kind: RouterKind, bias: Tensor, multiplies: bool) -> None:
    """The chosen are the best by scores and bias, each once; ties may fall either way."""
    ids = call.expert_ids.sort(-1).values
    require((ids[:, 1:] != ids[:, :-1]).all(), "a token with the same expert twice")
    scores = kind.values(call.logits.detach())
    bias = bias.to(scores.device)
    choice = scores * (1 + bias) if multiplies else scores + bias
    k = call.expert_ids.shape[-1]
    if multiplies or kind.selection == "logits":
        best = choice.topk(k, dim=-1).indices
    else:
        best = route(
            call.logits.detach(), k, score_function=kind.score_function, bias=bias, **_groups(router)
        ).expert_ids
    found, expected = (choice.gather(-1, ids).sort(-1).values for ids in (call.expert_ids, best))
    rounding = 4 * torch.finfo(choice.dtype).eps * choice.abs().max()
    wrong = (found - expected).abs().amax(-1) > rounding
    token = int(wrong.long().argmax())
    require(
        not wrong.any(),
        f"token {token} with experts {call.expert_ids[token].tolist()}, the best by score and bias are "
        f"{best[token].tolist()}; so for {int(wrong.sum())} of {wrong.numel()} tokens",
    )


def _require_plain_weights(call: RouterCall, plain: RouterCall, kind: RouterKind) -> None:
    """Weights of the same choice are the same bits; of any choice, the scores up to one factor a token."""
    _require_bits([call.logits], [plain.logits], "logits")
    same = (call.expert_ids == plain.expert_ids).all(-1)
    _require_bits([call.weights[same]], [plain.weights[same]], "weights of the same choice")
    rtol = 64 * max(torch.finfo(dtype).eps for dtype in (call.weights.dtype, torch.float32))
    (ids, weights), (plain_ids, plain_weights) = (_by_expert(c.expert_ids, c.weights) for c in (call, plain))
    same = (ids == plain_ids).all(-1)  # in another order: a sum over the chosen rounds otherwise
    apart = ((weights[same] / plain_weights[same]).double() - 1).abs()
    require((apart <= rtol).all(), f"weights of the same choice that are {_most(apart):.3g} away")
    factor = call.weights.double() / score(call.logits, kind.score_function).gather(-1, call.expert_ids).double()
    spread = (factor / factor[:, :1] - 1).abs()
    require((spread <= rtol).all(), f"weights that are not the scores of the chosen: off by {_most(spread):.3g}")


def _most(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _by_expert(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = ids.argsort(-1)
    return ids.gather(-1, order), weights.gather(-1, order)


# ---- invariants ----


def _unchanged(subject: Subject) -> None:
    """Attached with the biases that the model came with, without losses, outputs and every gradient must be the same
    bit for bit."""
    expected: tuple[list[Tensor], dict[str, Tensor]] | None = None
    strategies: dict[str, list[Balancer] | None] = {
        "nothing": None,
        "nothing, again": None,
        "attach()": [],
        "frozen": [Frozen()],
        "loss-free": [LossFree()],
        "loss-free and a loss of coefficient 0": [LossFree(), LoadBalancingLoss(0.0)],
    }
    for name, balancers in strategies.items():
        with case(attached=name):
            model = subject.copy()
            balance = None if balancers is None else attach(model, *balancers, where=subject.where)
            calls = subject.record(model)
            output, loss = _run(model, subject.batch)
            seen = [x for layer in calls.values() for call in layer for x in call[2:5]]
            (loss if balance is None else loss + balance.loss()).backward()
            found = ([*_tensors(output), *seen], _gradients(model))
            expected = found if expected is None else expected
            if name == "nothing, again" and not all(map(torch.equal, found[0], expected[0])):
                fail("the model itself is not reproducible: another output without equipoise; make it deterministic")
            _require_bits(found[0], expected[0], "output")
            _require_same_gradients(found[1], expected[1])


def _steers(subject: Subject) -> None:
    """A bias must move the choice to the top-k of score + bias, for the experts that compute too, and leave
    logits and weights as they are."""
    for size, biases in (("moderate", subject.biases(1.0)), ("large", subject.favourites())):
        for training in (True, False):
            with case(bias=size, training=training):
                _steers_by(subject, biases, training, Frozen())


def _steers_by_a_factor(subject: Subject) -> None:
    """A factor must move the choice to the top-k of score * (1 + bias), for the experts that compute too, and leave
    logits and weights as they are."""
    for found in find_routers(subject.model):
        if subject.where is not None and not subject.where(found.name, found.module):
            continue
        held = None if found.slot is None else found.slot.tensor
        grouped = _groups(found.module).get("num_groups", 1) > 1
        if grouped or found.kind.selection == "logits" or (held is not None and held.any()):
            raise PassedOver  # attach refuses a factor there
    biases = {name: bias.clamp(-0.9, 9) for name, bias in subject.biases(1.0).items()}
    biases = {name: bias / bias.abs().max() / 2 for name, bias in biases.items()}
    for size, given in (("moderate", biases), ("large", subject.favourites())):
        with case(factor=size):
            _steers_by(subject, given, True, LossFree(rule="multiplicative"))


def _steers_by(subject: Subject, biases: Mapping[str, Tensor], training: bool, balancer: Balancer) -> None:
    multiplies = balancer.multiplies
    plain = subject.copy().train(training)
    plain_calls = subject.record(plain)
    model, balance = subject.attached(balancer, biases=biases)
    model.train(training)
    with torch.no_grad():
        expected, _ = _run(plain, subject.batch)
        calls = subject.record(model)
        output, _ = _run(model, subject.batch)
        routers = subject.routers(plain)
        any_moved = False
        for name, (router, kind) in subject.routers(model).items():
            with case(layer=name):
                require(calls[name], "no call of the router")
                _require_bits([balance.biases[name].cpu()], [biases[name]], "Balance.biases")
                call = calls[name][-1]
                del plain_calls[name][:]
                with _seeded():
                    routers[name][0](*call.args, **call.kwargs)
                same_input = plain_calls[name][-1]
                _require_choice(call, router, kind, biases[name], multiplies)
                _require_plain_weights(call, same_input, kind)
                ids, plain_ids = (c.expert_ids.sort(-1).values for c in (call, same_input))
                any_moved = any_moved or not torch.equal(ids, plain_ids)
        if any_moved:
            same = torch.equal(_scalar(output), _scalar(expected))
            require(not same, "the output of the model without equipoise: the experts do not follow the choice")


def _counts(subject: Subject) -> None:
    """The load must be what the routers chose in training, each token once, with or without gradients, and nothing of
    evaluation or of what is paused."""
    model, balance = subject.attached(LossFree(), LoadBalancingLoss())
    calls = subject.record(model)
    expected = {name: torch.zeros_like(load) for name, load in balance.load.items()}
    num_tokens = 0

    def forward(batch: Mapping[str, Any], counts: bool) -> Tensor:
        nonlocal num_tokens
        _drain(calls)  # a backward may have called them again
        _, loss = _run(model, batch)
        mask = batch.get("attention_mask")
        for name, kept in _drain(calls).items() if counts else ():
            require(kept, f"no call of {name}")
            expected[name] += _count(kept, mask).to(expected[name].device)
            num_tokens = _num_tokens(kept, mask)
        return loss

    loss = forward(subject.batch, True)
    model.eval()
    forward(subject.batch, False)
    with torch.no_grad():
        forward(subject.flipped, False)
    model.train()
    with balance.paused():
        forward(subject.batch, False)
    (loss + balance.loss()).backward()
    with torch.no_grad():
        forward(subject.flipped, True)
    balance.loss()
    found = int(balance.num_tokens)
    require(found == num_tokens, f"num_tokens {found} for {num_tokens} tokens")
    balance.step()
    for name, load in balance.load.items():
        with case(layer=name):
            wanted = expected[name]
            require(torch.equal(load, wanted), f"a load of {load.tolist()}, counted by hand {wanted.tolist()}")


def _recomputation(subject: Subject) -> None:
    """Under activation checkpointing each token must be counted once and every gradient be the same, up to rounding."""
    balancers = (LossFree(), LoadBalancingLoss(0.5, scope="micro_batch"))
    plain, balance = subject.attached(*balancers)
    _, loss = _run(plain, subject.batch)
    (loss + balance.loss()).backward()
    expected, tried = _gradients(plain), False
    for reentrant in (False, True):
        for way in (_checkpointed_layers, _checkpointed_call):
            with case(use_reentrant=reentrant, checkpointed=way.__name__.removeprefix("_checkpointed_")):
                try:
                    way(subject.copy(), subject.batch, reentrant).backward()
                except Exception:  # the model itself cannot be checkpointed like this
                    continue
                tried = True
                model, balance = subject.attached(*balancers)
                calls = subject.record(model)
                loss = way(model, subject.batch, reentrant)
                once = _drain(calls)
                (loss + balance.loss()).backward()
                require(any(calls.values()), "no recomputation in the backward: nothing can be compared")
                balance.step()
                _require_counts(balance.load, once, subject.batch)
                _require_near(_gradients(model), expected, "a gradient")
    if not tried:
        raise PassedOver


def _checkpointed_layers(model: nn.Module, batch: Mapping[str, Any], reentrant: bool) -> Float[Tensor, ""]:
    """By the model's own switch, as Transformers has it."""
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": reentrant})
            return _run(model, batch)[1]
    raise PassedOver  # it has no such switch


def _checkpointed_call(model: nn.Module, batch: Mapping[str, Any], reentrant: bool) -> Float[Tensor, ""]:
    """The whole call."""
    one = torch.ones((), device=next(model.parameters()).device, requires_grad=True)  # a reentrant one must have a leaf
    with _seeded():
        return checkpoint(lambda leaf: leaf * _scalar(model(**batch)), one, use_reentrant=reentrant)


def _measuring(subject: Subject) -> None:
    """measuring() must count an evaluation, and leave the open window as it is."""
    model, balance = subject.attached(LossFree())
    calls = subject.record(model)
    with torch.no_grad():
        _run(model, subject.batch)
        training = _drain(calls)
        for mode in (False, True):
            with case(training=mode):
                with balance.measuring() as load:
                    _run(model.train(mode), subject.batch)
                require(load.keys() == calls.keys(), f"loads of {sorted(load)}, not of {sorted(calls)}")
                _require_counts(load, _drain(calls), subject.batch)
    balance.step()
    with case(of="the window in which it was measured"):
        _require_counts(balance.load, training, subject.batch)


def _require_free_copy(subject: Subject, model: nn.Module, balance: Balance, copy: nn.Module) -> None:
    """``copy`` is steered as ``model`` was, counted nowhere, and runs with weights and biases of its own."""
    keys = list(copy.state_dict())
    require(keys == list(model.state_dict()), f"state-dict keys {set(keys) ^ set(model.state_dict())} on one side only")
    with torch.no_grad():
        calls = subject.record(model)
        expected, _ = _run(model, subject.batch)
        before = _drain(calls)
        found, _ = _run(copy, subject.batch)
        _require_bits(_tensors(found), _tensors(expected), "output of the copy")
    _run(copy, subject.batch)[1].backward()  # no loss, so no ticket
    balance.loss()
    balance.step()
    with case(of="the model, after calls of its copy"):
        _require_counts(balance.load, before, subject.batch)
    with torch.no_grad():
        again, _ = _run(copy, subject.batch)
        with case(after="a step of the model"):
            _require_bits(_tensors(again), _tensors(expected), "output of the copy")
        expected, _ = _run(model, subject.batch)
        for router, _ in subject.routers(copy).values():
            for parameter in router.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).to(parameter))
        changed, _ = _run(copy, subject.batch)
        with case(after="another weight in the copy's routers"):
            same = torch.equal(_scalar(changed), _scalar(again))
            require(not same, "the same output of the copy: it runs with the weights of the model")
            _require_bits(_tensors(_run(model, subject.batch)[0]), _tensors(expected), "output of the model")


def _copies(subject: Subject) -> None:
    """A deepcopy must route by the biases that it was copied with and by weights of its own, and never be counted."""
    model, balance = subject.attached(LossFree(0.1, rule="sign"), LoadBalancingLoss(), biases=subject.biases(1.0))
    _require_free_copy(subject, model, balance, deepcopy(model))


def _pickles(subject: Subject) -> None:
    """What torch.save and torch.load bring back must be a copy like any other."""
    try:
        _saved(subject.copy())
    except Exception:  # the model itself cannot be pickled
        raise PassedOver from None
    model, balance = subject.attached(LossFree(0.1, rule="sign"), LoadBalancingLoss(), biases=subject.biases(1.0))
    _require_free_copy(subject, model, balance, _saved(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _state_dict(subject: Subject) -> None:
    """The state dict must have the same keys, and a plain one must load."""
    plain = subject.copy()
    model, _ = subject.attached(LossFree(), LoadBalancingLoss())
    found, expected = model.state_dict(), plain.state_dict()
    require(list(found) == list(expected), f"keys {sorted(found.keys() ^ expected.keys())} on one side only")
    for name in found:
        if isinstance(found[name], Tensor):
            _require_bits([found[name].to(expected[name].dtype)], [expected[name]], name)
    model.load_state_dict(expected)
    names = [name for name, _ in model.named_parameters()]
    require(names == [name for name, _ in plain.named_parameters()], "other names of parameters")


def _cast(subject: Subject) -> None:
    """A model that is cast to bfloat16 must be steered by the float32 biases all the same."""
    plain = subject.copy().to(torch.bfloat16)
    try:
        with torch.no_grad():
            _run(plain, subject.batch)
    except Exception:  # the model itself cannot run in bfloat16
        raise PassedOver from None
    biases = {name: 64 + bias for name, bias in subject.biases(1.0).items()}  # differences that 16 bits lose
    model, balance = subject.attached(Frozen(), biases=biases)
    model.to(torch.bfloat16)
    calls = subject.record(model)
    with torch.no_grad():
        _run(model, subject.batch)
    for name, (router, kind) in subject.routers(model).items():
        with case(layer=name):
            _require_bits([balance.biases[name].cpu()], [biases[name]], "Balance.biases")
            _require_choice(calls[name][-1], router, kind, biases[name], False)


def _step_reaches(subject: Subject) -> None:
    """After step() the routers must choose by the bias that it moved; step(applied=False) must move nothing."""
    model, balance = subject.attached(LossFree(0.1, rule="sign"))
    recorded = subject.record(model)
    with torch.no_grad():
        for applied in (True, False):
            before = balance.biases
            _run(model, subject.batch)
            balance.step(applied)
            for name, bias in balance.biases.items():
                with case(layer=name, applied=applied):
                    load, was = balance.load[name], before[name]
                    moved = not torch.equal(bias, was)
                    even = load.min() == load.max()
                    require(moved == (applied and not even), f"a bias of {bias.tolist()} after {was.tolist()}")
            _drain(recorded)
            with balance.paused():
                _run(model, subject.batch)
            calls = _drain(recorded)
            for name, (router, kind) in subject.routers(model).items():
                with case(layer=name, applied=applied):
                    _require_choice(calls[name][-1], router, kind, balance.biases[name], False)


def _attached_once(subject: Subject) -> None:
    """A second attach must be refused and leave the first as it is; a copy may be attached."""
    model, balance = subject.attached(LossFree(0.1, rule="sign"))
    try:
        attach(model, LossFree(), where=subject.where)
    except EquipoiseError:
        pass
    else:
        fail("a second Balance of the same routers")
    other = attach(deepcopy(model), LossFree(), where=subject.where)
    calls = subject.record(model)
    with torch.no_grad():
        _run(model, subject.batch)
    balance.step()
    _require_counts(balance.load, calls, subject.batch)
    require(not any(load.any() for load in other.load.values()), "counts of the model in the Balance of its copy")


def _detach(subject: Subject) -> None:
    """detach() must bring back classes, buffers, hooks, keys and outputs; a family's slot keeps the biases."""
    plain = subject.copy()
    model, balance = subject.attached(LossFree(0.1, rule="sign"), LoadBalancingLoss(), biases=subject.biases(1.0))
    _, loss = _run(model, subject.batch)
    (loss + balance.loss()).backward()
    balance.step()
    biases = balance.detach()
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    for (name, found), expected in zip(model.named_modules(), plain.modules(), strict=True):
        with case(module=name or "the model"):
            require(type(found) is type(expected), f"a {type(found)}, not a {type(expected)}")
            more = vars(found).keys() ^ vars(expected).keys()
            require(not more, f"attributes {sorted(more)} on one side only")
            require(found._buffers.keys() == expected._buffers.keys(), f"buffers {sorted(found._buffers)}")
            for kind in hooks:
                require(len(getattr(found, kind)) == len(getattr(expected, kind)), f"{kind[1:]} that were left")
    require(list(model.state_dict()) == list(plain.state_dict()), "other state-dict keys")
    for router in find_routers(plain):
        if router.slot is not None and router.name in biases:
            router.slot.replace(biases[router.name])
    with torch.no_grad():
        _require_bits(_tensors(_run(model, subject.batch)[0]), _tensors(_run(plain, subject.batch)[0]), "output")


def _loss_gradient(subject: Subject) -> None:
    """The gradient of LoadBalancingLoss at every parameter must be that of coefficient * sum over layers of
    E * sum_e f_e P_e, times the factor that the loss was given."""
    _require_loss_gradient(subject, subject.batch, subject.flipped)


def _require_loss_gradient(subject: Subject, *batches: dict[str, Any]) -> None:
    factors, coefficient = (0.25, 2.0), 0.5
    for scope in ("micro_batch", "global_batch"):
        plain = subject.copy()
        calls, seen, loads, losses = subject.record(plain), [], [], []
        for batch in batches:
            _run(plain, batch)
            seen.append(_drain(calls))
            if any(call.all_chosen or not call.graph for kept in seen[-1].values() for call in kept):
                raise PassedOver  # a loss without a gradient, or logits that cannot be recorded with theirs
            loads.append({name: _count(kept, batch.get("attention_mask")) for name, kept in seen[-1].items()})
        for batch, kept, own, factor in zip(batches, seen, loads, factors, strict=True):
            for name, (_, kind) in subject.routers(plain).items():
                load = own[name] if scope == "micro_batch" else torch.stack([load[name] for load in loads]).sum(0)
                losses.append(
                    factor * coefficient * _formula(kept[name], kind.score_function, load, batch.get("attention_mask"))
                )
        torch.stack(losses).sum().backward()
        model, balance = subject.attached(LoadBalancingLoss(coefficient, scope=scope))
        total: Tensor | float = 0.0
        for batch, factor in zip(batches, factors, strict=True):
            _, loss = _run(model, batch)
            total = total + 0 * loss + factor * balance.loss()
        assert isinstance(total, Tensor)
        total.backward()
        logits = [call.logits.dtype for calls in seen for kept in calls.values() for call in kept]
        with case(scope=scope, factors=factors, coefficient=coefficient):
            _require_near(_gradients(model), _gradients(plain), "a gradient", logits)


def _formula(
    calls: Sequence[RouterCall], score_function: str, load: Int[Tensor, " experts"], mask: Tensor | None
) -> Float[Tensor, ""]:
    """E * sum_e f_e P_e in float64."""
    require(all(call.logits.requires_grad for call in calls), "logits without a gradient")
    z = torch.cat([call.logits for call in calls]).double()
    if score_function == "softmax":
        s = (z - z.logsumexp(-1, keepdim=True)).exp()
    elif score_function == "sigmoid":
        s = 1 / (1 + (-z).exp())
    else:
        s = (1 + z.exp()).log().sqrt()
    p = s / s.sum(-1, keepdim=True)
    counted = torch.ones_like(p[:, 0]) if mask is None else (mask.reshape(-1) != 0).to(p).repeat(len(calls))
    mean = (p * counted[:, None]).sum(0) / counted.sum()
    share = load.to(p) / load.sum().to(p)
    return load.numel() * (share * mean).sum()


def _padding(subject: Subject) -> None:
    """What attention_mask masks must not be counted, nor be seen by the loss."""
    shape = next((v.shape[:2] for v in subject.batch.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
    if "attention_mask" not in _arguments(subject.model) or shape is None or shape[1] < 4:
        raise PassedOver
    mask = torch.ones(shape, dtype=torch.int64, device=next(subject.model.parameters()).device)
    mask[0, : shape[1] // 4] = 0
    mask[-1, -(shape[1] // 3) :] = 0
    batch = {**subject.batch, "attention_mask": mask}
    model, balance = subject.attached(LossFree(), LoadBalancingLoss(scope="sequence"))
    calls = subject.record(model)
    with case(attention_mask=f"with {int((mask == 0).sum())} zeros"):
        _, loss = _run(model, batch)
        seen = _drain(calls)
        (loss + balance.loss()).backward()
        for kept in seen.values():
            found, expected = int(balance.num_tokens), _num_tokens(kept, mask)
            require(found == expected, f"num_tokens {found}, not {expected}")
        balance.step()
        _require_counts(balance.load, seen, batch)
        if all(call.graph and not call.all_chosen for kept in seen.values() for call in kept):
            _require_loss_gradient(subject, batch, {**subject.flipped, "attention_mask": mask.flip(1)})


_INVARIANTS: dict[str, Callable[[Subject], None]] = {
    "unchanged at bias zero": _unchanged,
    "bias moves the choice only": _steers,
    "factor moves the choice only": _steers_by_a_factor,
    "counts each token once": _counts,
    "recomputation is not counted": _recomputation,
    "measuring counts evaluation": _measuring,
    "padding is not counted": _padding,
    "loss gradient": _loss_gradient,
    "step reaches the router": _step_reaches,
    "copies": _copies,
    "pickle": _pickles,
    "state dict": _state_dict,
    "cast keeps float32 biases": _cast,
    "attached once": _attached_once,
    "detach restores": _detach,
}
TAP_INVARIANTS: tuple[str, ...] = tuple(_INVARIANTS)
