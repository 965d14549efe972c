"""Which biases a model begins with when it is attached."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from equipoise._text import abbreviate
from equipoise.balancers import Balancer, format_strategy
from equipoise.counting.biases import slot_value
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers import MoELayer
from equipoise.routers.tapped import tap_of
from equipoise.saved import BIASES_FILE, LayerBiases, names_biases, read_biases, saved_beside

_log = logging.getLogger("equipoise")

BiasesOrPath = Mapping[str, Tensor] | str | os.PathLike[str]


def starting_biases(
    model: nn.Module, layers: Sequence[MoELayer], balancers: Sequence[Balancer], biases: BiasesOrPath | None
) -> dict[str, Tensor]:
    """The biases by layer, float32: those that the caller gave, or saved beside the weights, or held by the slots."""
    steers = any(balancer.has_bias for balancer in balancers)
    multiplies = any(balancer.multiplies for balancer in balancers)
    if biases is not None and not steers:
        raise UsageError(
            f"biases must have a balancer that keeps them: got the strategy {format_strategy(balancers)}. Add frozen "
            "or loss-free to it."
        )
    source = _beside_weights(model, layers, balancers, multiplies) if biases is None else biases
    if source is None:
        if steers:
            _warn_of_rounded_slots(layers)
        start = {layer.name: slot_value(layer, multiplies) for layer in layers}
    else:
        start = _read(source, layers, multiplies)
    for name, value in start.items():
        if steers and not value.isfinite().all():
            raise EquipoiseError(
                f"the bias of {name} must hold finite numbers: it does not. It is damaged, or was never filled after "
                "to_empty(). Load the checkpoint, or set it to zero, before attach."
            )
    return start


def _beside_weights(
    model: nn.Module, layers: Sequence[MoELayer], balancers: Sequence[Balancer], multiplies: bool
) -> Path | None:
    """The file that the model was saved with, if its layers have no slot that would have brought the biases."""
    if not (multiplies or names_biases(model) or any(layer.slot is None for layer in layers)):
        return None
    if any(tap_of(layer.router) is not None for layer in layers):
        return None  # a copy of an attached model holds newer ones
    path = saved_beside(model)
    if not names_biases(model):
        if path is not None:
            _log.warning(
                f"attach: {path} is beside the weights, and the model's config does not name it: it is not used. If it "
                f"belongs to the weights, give biases={str(path.parent)!r}; else delete it. save_biases names it in "
                "the config if it is called after save_pretrained."
            )
        return None
    if not any(balancer.has_bias for balancer in balancers):
        if path is not None and not any(bias.any() for bias in read_biases(path)[0].values()):
            return None  # never moved: it routes as it was trained
        _log.warning(
            f"attach: the model was saved with biases, and {format_strategy(balancers)} keeps none: it routes "
            "differently from how it was trained. Add frozen to it to route with them."
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


def _warn_of_rounded_slots(layers: Sequence[MoELayer]) -> None:
    """Biases go on in float32 from what a slot holds."""
    rounded = {}
    for layer in layers:
        tensor = None if layer.slot is None else layer.slot.tensor
        is_short = tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16)
        if tensor is not None and is_short and tensor.device.type != "meta" and tensor.any():
            rounded[layer.name] = str(tensor.dtype).removeprefix("torch.")
    if rounded:
        _log.warning(
            f"attach: the slots hold rounded biases: {abbreviate(rounded)}. Training begins from these. Load the model "
            "in float32 to begin where it was trained. A state that is loaded later takes their place."
        )


def _read(source: BiasesOrPath, layers: Sequence[MoELayer], multiplies: bool) -> dict[str, Tensor]:
    if isinstance(source, Mapping):
        biases: Mapping[str, Tensor] = source
        are_factors = source.multiplies if isinstance(source, LayerBiases) else multiplies  # a plain one does not say
    elif isinstance(source, str | os.PathLike):
        biases, are_factors = read_biases(source)
    else:
        raise TypeError(
            f"biases must be tensors by layer name, or the path of saved ones: got {type(source).__name__}."
        )
    if isinstance(biases.get("biases"), Mapping):  # a whole state_dict()
        are_factors = bool(biases.get("multiplies", False))
        biases = biases["biases"]  # type: ignore[assignment]
    if are_factors != multiplies:
        factors = "multiply the scores. Attach frozen:multiplies=true, or loss-free with rule=multiplicative."
        addends = "are added to the scores. Attach frozen, or a rule other than multiplicative."
        raise UsageError(f"biases must act as they were trained: these {factors if are_factors else addends}")
    if not all(isinstance(value, Tensor) for value in biases.values()):
        raise EquipoiseError(
            "biases must be tensors by layer name: got other values. Pass Balance.biases, or the path of saved ones."
        )
    sizes = {name: tuple(value.shape) for name, value in biases.items()}
    expected = {layer.name: (layer.num_experts,) for layer in layers}
    if sizes != expected:
        raise EquipoiseError(
            f"biases must name the layers of this model: got {abbreviate(sizes)}, expected {abbreviate(expected)}. "
            "Pass those of this model, or choose its layers with where=..."
        )
    for name, value in biases.items():
        if not value.is_floating_point() or not value.isfinite().all():
            raise EquipoiseError(
                f"biases must be finite floating-point numbers: those of {name} are not. They are damaged, or training "
                "had diverged; take earlier ones."
            )
    return {layer.name: biases[layer.name].detach().float().to(slot_value(layer).device, copy=True) for layer in layers}
