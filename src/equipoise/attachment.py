"""``attach``: finds the routers of a model, reads their biases, agrees with the other ranks, makes a ``Balance``.

The module is not called ``attach``: importing a module of that name would hide the function ``equipoise.attach``.
"""

import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equipoise._text import abbreviate
from equipoise.balance import Balance
from equipoise.balancers import Balancer, LoadBalancingLoss, ZLoss, format_strategy, parse_strategy
from equipoise.counting.pool import Pool, digest_of
from equipoise.counting.start import BiasesOrPath, starting_biases
from equipoise.errors import EquipoiseError, UsageError
from equipoise.recipes import RECIPES
from equipoise.routers import MoELayer
from equipoise.routers.find import find_routers, proof_of, unknown_routers
from equipoise.routers.outputs import Refused
from equipoise.routers.tapped import has_live_tap, tap_of, untap_router
from equipoise.torch_internals import check_private_names, without_compile

__all__ = ["attach", "base_model", "resolve", "unwrap"]

_DDP = nn.parallel.DistributedDataParallel
_log = logging.getLogger("equipoise")
_Where = Callable[[str, nn.Module], bool] | None


@torch.inference_mode(False)  # the biases outlive an evaluation in inference mode
def attach(
    model: nn.Module,
    *balancers: Balancer | str,
    where: _Where = None,
    group: Any | None = None,
    biases: BiasesOrPath | None = None,
    fused: bool = False,
    allow_empty: bool = False,
) -> Balance:
    """Attaches balancers to the mixture-of-experts model you already have.

        balance = equipoise.attach(model, "loss-free:rate=1e-3", LoadBalancingLoss(1e-4))
        loss = model(**micro_batch).loss + balance.loss()      # every micro-batch
        optimizer.step(); balance.step()                       # every optimizer step

    Args:
        model: the model; may be wrapped (DDP, FSDP2, compiled, PEFT).
        balancers: mechanisms, as objects or strategy strings. None at all only counts.
        where: ``where(name, router) -> bool`` chooses layers; default all.
        group: the process group, or a ``DeviceMesh``, whose ranks hold different tokens of the same layers; default
            the world. Data, sharded, context and sequence parallel ranks do. Tensor parallel ranks hold the same
            tokens, and pipeline stages other layers: ``group=mesh["dp", "cp"]``. Expert parallel ranks belong to it if
            their tokens differ: each counts all experts, whoever holds them.
        biases: by layer, the biases to begin with, or the path of saved ones. Default: what the model's slots hold; if
            it has none, what was saved beside the weights that it was loaded from.
        fused: on a GPU, compute what is counted of a call, and the gradient of the losses, by Triton kernels: fewer
            launches, the same numbers. On a CPU nothing changes. Compiled for GPUs, but not yet run on one.
        allow_empty: accept a model without routers, a pipeline stage of dense layers. Its ``Balance`` does nothing.

    Returns:
        The ``Balance`` of the model. It closes micro-batches and windows, and holds what was counted.

    Raises:
        EquipoiseError: no router can be proven; one does not select as its declared ``router_kind`` says, cannot be
            steered by the strategy, or is attached already; the ranks differ in layers, strategy or biases, or this one
            is not in ``group``; ``biases`` are damaged or of other layers; ``fused`` without Triton.
        UsageError: a strategy string has an unknown name, option or value; two balancers would move the bias;
            ``biases`` multiply where the strategy adds, or no balancer keeps them.
        TypeError: an argument has another type.

    Collective over ``group``: every rank compares layers, strategies and biases, and raises the same error if they
    differ. With ``where`` not given, routers that cannot be proven beside others that can are left out with a warning.

    A router without a slot sets an option of torch.compile for the whole process until ``detach``: a compiled graph may
    skip side effects in a recomputation (``skip_fwd_side_effects_in_bwd_under_checkpoint``).

    With balancers at bias zero and without losses, logits, weights, choices and gradients of the model are the same
    bit for bit.

    Create an average of the weights (EMA) after ``attach``, and again after ``detach``: between the two, routers
    without a slot have one extra buffer. Likewise, install hooks that replace a module's forward, such as those of
    accelerate for offloading, only after ``attach``. What replaced a router's class or parameters before ``attach`` (a
    parametrization) must stay until ``detach``; what does so after may come and go.
    """
    check_private_names()
    pool = Pool(group)
    plan, error = None, None
    try:
        if fused:
            _check_triton()
        plan = _plan(model, balancers, where, biases, allow_empty)
    except Exception as caught:
        error = caught
    try:
        _compare_ranks(pool.agree("attach", None if plan is None else plan.in_common(), error))
        assert plan is not None  # agree raises every rank's error
        _warn(plan, balancers, has_filter=where is not None)
        for layer in plan.layers:
            if tap_of(layer.router) is not None:  # a copy of an attached model: take its inert tap off
                untap_router(layer.router, layer.slot)
        return Balance(plan.model, plan.layers, plan.balancers, pool, plan.start, fused)
    except BaseException:
        pool.close()
        raise


def _check_triton() -> None:
    try:
        import_module("equipoise.kernels")
    except ImportError as error:
        raise EquipoiseError(
            f"fused=True must have Triton, which builds of torch for GPUs on Linux bring along: {error}. Install the "
            "version of Triton that fits this torch, or leave fused out."
        ) from error


class _Plan(NamedTuple):
    """What one rank is going to attach."""

    model: nn.Module  # without wrappers
    layers: list[MoELayer]
    balancers: list[Balancer]
    start: dict[str, Tensor]

    def in_common(self) -> tuple[tuple[str, list[tuple[Any, ...]]], str | None]:
        """What every rank must attach, and a digest of its biases; None if there is nothing to compare."""
        layers = [(layer.name, layer.num_experts, layer.k, layer.kind) for layer in self.layers]
        steers = any(balancer.has_bias for balancer in self.balancers)
        on_meta = any(parameter.device.type == "meta" for parameter in self.model.parameters())
        digest = digest_of(self.start) if steers and not on_meta else None
        return (format_strategy(self.balancers), layers), digest


# ---- phase 1: what this rank attaches ----


def _plan(
    model: nn.Module, balancers: Sequence[Balancer | str], where: _Where, biases: BiasesOrPath | None, allow_empty: bool
) -> _Plan:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}.")
    if where is not None and not callable(where):
        raise TypeError(f"where must be a function of (name, router): got {type(where).__name__}.")
    inner = base_model(unwrap(model))
    resolved = resolve(balancers)
    layers = [layer for layer in find_routers(inner, allow_empty) if where is None or where(layer.name, layer.router)]
    if not layers and not allow_empty:
        raise EquipoiseError("where must choose at least one router: it chose none.")
    for layer in layers:
        if has_live_tap(layer.router):
            raise EquipoiseError(
                f"a router must be attached once: {layer.name} is attached already. Call detach() on its Balance "
                "first. A shallow copy shares the tensors of the router: make copies with copy.deepcopy."
            )
        if any(balancer.has_bias for balancer in resolved) and layer.obstacle is not None:
            raise EquipoiseError(
                f"a bias must be able to steer every router: {layer.name} ({type(layer.router).__name__}) cannot be "
                f"steered: {layer.obstacle}. Attach lbl, which balances by a loss, or nothing, which counts. Or leave "
                "the router out with where=..."
            )
        if any(balancer.multiplies for balancer in resolved):
            _check_factor(layer)
    if any(balancer.has_bias for balancer in resolved):
        _check_own_slots(layers)
    _check_own_losses(layers, resolved)
    return _Plan(inner, layers, resolved, starting_biases(inner, layers, resolved, biases))


def _check_own_slots(layers: Sequence[MoELayer]) -> None:
    """Raises if two routers would be steered by one tensor: each layer's bias would overwrite the other's."""
    names: dict[int, str] = {}  # by the tensor, or by the buffers among which ours will be
    for layer in layers:
        steers: Any = layer.router._buffers
        if layer.slot is not None:
            steers = {**layer.slot.holder._buffers, **layer.slot.holder._parameters}[layer.slot.name]
        other = names.setdefault(id(steers), layer.name)
        if other != layer.name:
            raise EquipoiseError(
                f"routers must have tensors of their own: {layer.name} and {other} share those that steer them, as a "
                "shallow copy does. Use one router twice, or copy.deepcopy."
            )


def _check_own_losses(layers: Sequence[MoELayer], balancers: Sequence[Balancer]) -> None:
    """Raises if the framework adds the same kind of loss too."""
    for layer in layers:
        own = layer.own_balancing
        for kind, option, name in ((LoadBalancingLoss, own.loss, "balancing loss"), (ZLoss, own.z_loss, "z-loss")):
            if option is not None and any(isinstance(balancer, kind) for balancer in balancers):
                raise EquipoiseError(
                    f"one {name} must be enough: {layer.kind.adapter.framework} adds its own to {layer.name} "
                    f"({option}). Set that to zero before the model is built, or attach a strategy without a {name}."
                )


def _check_factor(layer: MoELayer) -> None:
    tensor = None if layer.slot is None else layer.slot.tensor
    if tensor is not None and tensor.device.type != "meta" and tensor.any():
        raise EquipoiseError(
            f"the slot of {layer.name} must be zero for a multiplicative bias: the router adds its {layer.kind.slot} "
            "before the top-k. The factor would scale the sum, and reverse the order of experts where it is negative. "
            "Zero the slot, or take a rule that adds."
        )
    try:
        proof_of(layer.router, None if layer.slot is None else layer.slot.holder, multiplies=True)
    except Refused as reason:
        raise EquipoiseError(
            f"a multiplicative bias must be all that steers a router: of {layer.name} ({type(layer.router).__name__}) "
            f"it is not: {reason}. Take a rule that adds, or leave the router out with where=..."
        ) from None


def resolve(balancers: Sequence[Balancer | str]) -> list[Balancer]:
    """The balancers that these objects and strategy strings name. Raises ``UsageError`` if two would move the bias."""
    resolved: list[Balancer] = []
    for balancer in balancers:
        if not isinstance(balancer, Balancer | str):
            raise TypeError(
                f"a balancer must be an object such as LossFree() or a strategy string: got {type(balancer).__name__}."
            )
        resolved += parse_strategy(balancer) if isinstance(balancer, str) else [balancer]
    steering = [str(balancer) for balancer in resolved if balancer.has_bias]
    if len(steering) > 1:
        raise UsageError(f"only one balancer may move the bias: got {' and '.join(steering)}. Leave one out.")
    return resolved


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile and DistributedDataParallel."""
    while (inner := model.module if isinstance(model, _DDP) else without_compile(model)) is not model:
        model = inner
    return model


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, adapters included, with the layer names of the plain model; or the model itself."""
    # By class, not by instance: adapters look every missing name up in the model inside.
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


# ---- phase 2: what all ranks must have in common ----


def _compare_ranks(by_rank: Sequence[tuple[Any, str | None]]) -> None:
    first, _ = by_rank[0]
    for rank, (description, _) in enumerate(by_rank):
        if description != first:
            raise EquipoiseError(
                "every rank must attach the same strategy to the same layers: rank 0 of the group has "
                f"{_described(first)}, rank {rank} has {_described(description)}."
            )
    if len({digest for _, digest in by_rank} - {None}) > 1:
        raise EquipoiseError(
            "every rank must begin with the same biases: they differ from rank to rank. Load the same checkpoint on "
            "every rank, or broadcast the model (as DistributedDataParallel does), before attach."
        )


def _described(description: Any) -> str:
    strategy, layers = description
    return f"{strategy} on {abbreviate({name: num_experts for name, num_experts, _, _ in layers})}"


# ---- phase 3: what the user should know ----


def _warn(plan: _Plan, balancers: Sequence[Balancer | str], has_filter: bool) -> None:
    if not has_filter and (unknown := unknown_routers(plan.model)):
        _log.warning(
            f"attach: {abbreviate(unknown)} is neither counted nor balanced: it could not be proven. Mend what the "
            "reason says, or choose layers with where=... to say that it may be left out."
        )
    _warn_of_own_balancing(plan)
    functions = {layer.kind.score_function for layer in plan.layers}
    for balancer in balancers:
        recipe = RECIPES.get(balancer) if isinstance(balancer, str) else None
        if recipe is not None and functions and functions != {recipe.score_function}:
            _log.warning(
                f"attach: the recipe {balancer} was published with {recipe.score_function} scores, this model has "
                f"{' and '.join(sorted(functions))} scores. Rates are in units of the scores and may not carry over."
            )


def _warn_of_own_balancing(plan: _Plan) -> None:
    framework = next((layer.kind.adapter.framework for layer in plan.layers if layer.kind.adapter.framework), "")
    updates = {layer.own_balancing.bias_update for layer in plan.layers} - {None}
    if updates and any(balancer.has_bias for balancer in plan.balancers):
        _log.warning(
            f"attach: the bias update of {framework} ({abbreviate(sorted(map(str, updates)))}) is off until detach(): "
            "the attached strategy owns the bias."
        )
    losses = {layer.own_balancing.loss for layer in plan.layers} - {None}
    if losses and plan.balancers:
        _log.warning(
            f"attach: {framework} adds a balancing loss of its own ({abbreviate(sorted(map(str, losses)))}), beside "
            f"{format_strategy(plan.balancers)}."
        )
