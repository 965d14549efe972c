"""Finds the routers of a model, agrees with the other ranks, and makes a ``Balance``."""

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equipoise._text import abbreviate
from equipoise.balance import Balance
from equipoise.balancers import Balancer, format_strategy, parse_strategy
from equipoise.counting.pool import Pool, digest
from equipoise.counting.recorder import Layer, slot_of
from equipoise.errors import EquipoiseError, UsageError
from equipoise.recipes import RECIPES
from equipoise.routers.find import find_routers, proof_of, refusal, unknown_routers
from equipoise.routers.prove import Refused
from equipoise.routers.tap import is_tapped, untap_router
from equipoise.saved import BIASES_FILE, names_biases, read_biases, saved_beside

__all__ = ["attach", "base_model", "resolve", "unwrap"]

_log = logging.getLogger("equipoise")


@torch.inference_mode(False)  # biases outlive an evaluation under inference mode
def attach(
    model: nn.Module,
    *balancers: Balancer | str,
    where: Callable[[str, nn.Module], bool] | None = None,
    group: Any | None = None,
    biases: Mapping[str, Tensor] | str | os.PathLike[str] | None = None,
    allow_empty: bool = False,
) -> Balance:
    """Attaches balancers to the mixture-of-experts model you already have.

        balance = equipoise.attach(model, LossFree(rate=1e-3), LoadBalancingLoss(1e-4, scope="sequence"))
        loss = model(**micro_batch).loss + balance.loss()      # every micro-batch
        optimizer.step(); balance.step()                       # every optimizer step

    Args:
        model: the model; may be wrapped (DDP, FSDP2, compiled, PEFT).
        balancers: mechanisms, as objects or strategy strings; none at all only counts.
        where: ``where(name, router) -> bool`` chooses layers; default all.
        group: the process group, or a ``DeviceMesh``, whose ranks hold different tokens of the same layers; default
            the world. Data, sharded, context and sequence parallel ranks do, tensor parallel ones hold the same tokens
            and pipeline stages other layers: ``group=mesh["dp", "cp"]``. Expert parallel ranks count all experts,
            whoever holds them, so they are in it when their tokens differ.
        biases: by layer, the biases to begin with, or the path of saved ones; default what the model's slots hold,
            and where it has none, what lies beside the weights that it was loaded from.
        allow_empty: accept a model without routers, a pipeline stage of dense layers: its ``Balance`` does nothing.

    An average of the weights (EMA) is made after ``attach``, and anew after ``detach``: a family without a slot has a
    buffer more in each router meanwhile. Hooks that replace a module's forward (accelerate's, for offloading) too come
    after it.

    With balancers at bias zero and without losses, logits, weights, choices and gradients of the model are the same
    bit for bit. Collective over ``group``: every rank compares layers, strategies and biases and raises the same
    error when they differ. Raises ``EquipoiseError`` when the model holds no router that is known, or one that behaves
    otherwise than its family, or when it is attached already.
    """
    pool = Pool(group)
    error: Exception | None = None
    fingerprint: Any = None
    start_digest: str | None = None
    try:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}.")
        if where is not None and not callable(where):
            raise TypeError(f"where must be a function of (name, router): got {type(where).__name__}.")
        inner = base_model(unwrap(model))
        resolved = resolve(balancers)
        multiplies = any(balancer.multiplies for balancer in resolved)
        layers = _find_layers(inner, where, multiplies, allow_empty)
        if biases is not None and not any(balancer.has_bias for balancer in resolved):
            raise UsageError(
                f"biases must have a balancer that holds them: got the strategy {format_strategy(resolved)}. Add "
                "frozen or loss-free to it."
            )
        if biases is None:
            biases = _beside_weights(inner, layers, resolved, multiplies)
        if biases is None:
            _warn_of_rounded(layers, resolved)
            start = {x.name: slot_of(x, multiplies) for x in layers}
        else:
            start = _read_biases(biases, layers, multiplies)
        fingerprint = (format_strategy(resolved), [(x.name, x.num_experts, x.k, x.kind) for x in layers])
        steered = any(balancer.has_bias for balancer in resolved)
        for name, value in start.items():
            if steered and not value.isfinite().all():
                raise EquipoiseError(
                    f"the bias of {name} must hold finite numbers: it does not. It is damaged, or was never filled "
                    "after to_empty(); load the checkpoint, or set it to zero, before attach."
                )
        if steered and not any(p.device.type == "meta" for p in inner.parameters()):
            start_digest = digest(start)
    except Exception as caught:
        error = caught
    everyone = pool.agree("attach", (fingerprint, start_digest), error)
    for rank, (theirs, _) in enumerate(everyone):
        if theirs != everyone[0][0]:
            raise EquipoiseError(
                "every rank must attach the same strategy to the same layers: rank 0 of the group has "
                f"{_describe(everyone[0][0])}, rank {rank} has {_describe(theirs)}."
            )
    if len({found for _, found in everyone} - {None}) > 1:
        raise EquipoiseError(
            "every rank must begin with the same biases: they differ from rank to rank. Load the same checkpoint on "
            "every rank, or broadcast the model (as DistributedDataParallel does), before attach."
        )
    if where is None and (left_out := unknown_routers(inner)):
        _log.warning(
            f"attach: {abbreviate(left_out)} is neither counted nor balanced: equipoise does not know it. Give it an "
            "attribute router_kind, or choose layers with where=... to say that it may be left out."
        )
    for named in balancers:
        score_functions = {layer.kind.score_function for layer in layers}
        if (
            score_functions
            and isinstance(named, str)
            and named in RECIPES
            and score_functions != {RECIPES[named].score_function}
        ):
            _log.warning(
                f"attach: the recipe {named} was published with a {RECIPES[named].score_function} scores, this model has "
                f"{' and '.join(sorted(score_functions))}: rates are in the units of the scores and need not carry over."
            )
    _reset_dynamo(model)
    _warn_of_another_loss(inner, resolved)
    for layer in layers:
        if "_equipoise" in layer.router.__dict__:  # a copy of an attached model: take its inert tap off
            untap_router(layer.router, layer.slot)
    return Balance(inner, layers, resolved, pool, start)


def _beside_weights(
    model: nn.Module, layers: Sequence[Layer], balancers: Sequence[Balancer], multiplies: bool
) -> Path | None:
    """The biases that the model was saved with, where its layers have no slot that would have brought them."""
    if not (multiplies or names_biases(model) or any(layer.slot is None for layer in layers)):
        return None
    if any("_equipoise" in layer.router.__dict__ for layer in layers):
        return None  # a copy of an attached model: it holds newer ones
    path = saved_beside(model)
    if not names_biases(model):
        if path is not None:
            _log.warning(
                f"attach: {path} lies beside the weights, and the model's config does not name it: it is not taken. "
                f"If the weights belong to it, give biases={str(path.parent)!r}; else delete it. save_biases names "
                "it when it is called after save_pretrained."
            )
        return None
    if not any(balancer.has_bias for balancer in balancers):
        _log.warning(
            f"attach: the model was saved with biases, and {format_strategy(balancers)} holds none: it routes "
            "otherwise than it was trained. Add frozen to it to route with them."
        )
        return None
    if path is None:
        raise EquipoiseError(
            f"a model that was saved with biases must find them: its config names {BIASES_FILE}, which is not beside "
            f"the weights ({getattr(model.config, '_name_or_path', '') or 'loaded from nowhere'}). Give "
            "biases=FOLDER, or begin from zero with del model.config.equipoise."
        )
    _log.info(f"attach: begins with the biases of {path}")
    return path


def _warn_of_rounded(layers: Sequence[Layer], balancers: Sequence[Balancer]) -> None:
    """Biases go on in float32 from what a slot holds."""
    found = {}
    for layer in layers if any(balancer.has_bias for balancer in balancers) else ():
        held = None if layer.slot is None else layer.slot.tensor
        short = held is not None and held.dtype in (torch.bfloat16, torch.float16)
        if held is not None and short and held.device.type != "meta" and held.any():
            found[layer.name] = str(held.dtype).removeprefix("torch.")
    if found:
        _log.warning(
            f"attach: the bias comes rounded in {abbreviate(found)}, and so the biases begin. Load the model in float32 to "
            "begin where it was trained; a state that is loaded after takes their place."
        )


def _warn_of_another_loss(model: nn.Module, balancers: Sequence[Balancer]) -> None:
    config = getattr(model, "config", None)
    coefficient = getattr(config, "router_aux_loss_coef", 0) or 0
    if coefficient and getattr(config, "output_router_logits", False) and balancers:
        _log.warning(
            "attach: the model adds a load-balancing loss of its own (output_router_logits with router_aux_loss_coef="
            f"{coefficient:g}), and {format_strategy(balancers)} acts beside it. Set "
            "model.config.output_router_logits = False to have the one only."
        )


def _describe(fingerprint: Any) -> str:
    strategy, layers = fingerprint
    return f"{strategy} on {abbreviate({name: size for name, size, _, _ in layers})}"


def _find_layers(
    model: nn.Module, where: Callable[[str, nn.Module], bool] | None, multiplies: bool, allow_empty: bool
) -> list[Layer]:
    layers = []
    for name, router, kind, slot, num_experts, k in find_routers(model, allow_empty):
        if where is not None and not where(name, router):
            continue
        if is_tapped(router):
            raise EquipoiseError(
                f"a router must be attached once: {name} is attached already. Call detach() on its Balance first."
            )
        held = None if slot is None else slot.tensor
        if multiplies and held is not None and held.device.type != "meta" and held.any():
            raise EquipoiseError(
                f"a factor must find a slot of zeros: {name} adds its {kind.slot} before the top-k, which the factor "
                "would multiply too, upside down where the sum is below zero. Zero the slot, or take a rule that adds."
            )
        if multiplies:
            try:
                proof_of(router, None if slot is None else slot.holder, multiplies=True)
            except Refused as reason:
                raise refusal(name, router, f"{reason}, and a factor must be all that steers it", kind) from None
        layers.append(Layer(name, router, kind, num_experts, k, slot))
    if not layers and not allow_empty:
        raise EquipoiseError("where must choose at least one router: it chose none.")
    return layers


def resolve(balancers: Sequence[Balancer | str]) -> list[Balancer]:
    """The balancers that these objects and strategy strings name; refused where two would move the bias."""
    result: list[Balancer] = []
    for balancer in balancers:
        if isinstance(balancer, str):
            result += parse_strategy(balancer)
        elif isinstance(balancer, Balancer):
            result.append(balancer)
        else:
            raise TypeError(
                f"a balancer must be an object such as LossFree() or a strategy string: got {type(balancer).__name__}."
            )
    steering = [str(balancer) for balancer in result if balancer.has_bias]
    if len(steering) > 1:
        raise UsageError(f"one balancer may move the bias: got {' and '.join(steering)}. Leave one out.")
    return result


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile and DistributedDataParallel put around it."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, adapters included, whose layers have the names that they have without; or itself.

    By class and not by instance: adapters hand every name that they lack on to the model inside.
    """
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model


def _reset_dynamo(model: nn.Module) -> None:
    """Graphs that were compiled before the taps were there would go on without them."""
    dynamo = sys.modules.get("torch._dynamo")
    compiled = hasattr(model, "_orig_mod") or any(m._compiled_call_impl is not None for m in model.modules())
    if dynamo is not None and compiled and dynamo.utils.counters["frames"]["total"]:
        _log.warning(
            "attach: the model was compiled and called before; compiled graphs are dropped (torch._dynamo.reset) and "
            "made anew. Attach before the first call to save that."
        )
        dynamo.reset()


def _read_biases(
    biases: Mapping[str, Tensor] | str | os.PathLike[str], layers: list[Layer], multiplies: bool
) -> dict[str, Tensor]:
    theirs = multiplies  # of a mapping by layer nobody knows
    if not isinstance(biases, Mapping):
        biases, theirs = read_biases(biases)
    if isinstance(biases.get("biases"), Mapping):  # a whole state_dict()
        theirs = bool(biases.get("multiplies", False))
        biases = biases["biases"]  # type: ignore[assignment]
    if theirs != multiplies:
        raise UsageError(
            "biases must be held as they were trained: these "
            + (
                "multiply the scores. Attach frozen:multiplies=true, or loss-free with rule=multiplicative."
                if theirs
                else "are added to the scores. Attach frozen, or a rule other than multiplicative."
            )
        )
    if not all(isinstance(value, Tensor) for value in biases.values()):
        raise EquipoiseError("biases must be tensors by layer name, as Balance.biases gives them: got other values.")
    sizes = {name: tuple(value.shape) for name, value in biases.items()}
    wanted = {layer.name: (layer.num_experts,) for layer in layers}
    if sizes != wanted:
        raise EquipoiseError(
            f"biases must name the layers of this model: got {abbreviate(sizes)}, expected {abbreviate(wanted)}."
        )
    for name, value in biases.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise EquipoiseError(f"biases must be finite floating-point numbers: those of {name} are not.")
    return {layer.name: biases[layer.name].detach().float().to(slot_of(layer).device, copy=True) for layer in layers}
