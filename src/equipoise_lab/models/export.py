"""Did the expert biases survive in a saved checkpoint? Reads its tensors one by one, without building the model.

A bias that steers the choice of experts is easily lost after training: left out of the checkpoint, saved in 16 bits, or
rounded on loading. The biases of one layer differ by little. If they lie far from zero, 16 bits leave only a few
different values, and most tokens go to other experts. Subtracting the mean changes no choice and saves those bits.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from equipoise.errors import UsageError
from equipoise.routers.find import find_routers
from equipoise.routers.kind import MoELayer
from equipoise.routers.names import named_modules
from equipoise.routing import route, score
from equipoise.saved import BIASES_FILE, frozen_strategy, read_biases
from equipoise_lab.models.folders import model_folder
from equipoise_lab.models.structure import ConfigFile, build_structure, read_config
from equipoise_lab.models.weights import Weights, find_weights

__all__ = ["ExportCheck", "LayerCheck", "check_export"]

TOKENS = 4096


@dataclass(frozen=True)
class LayerCheck:
    """One router's bias in a checkpoint. A field is None if the checkpoint lacks the tensor that it needs.

    ``rerouted`` is the share of tokens, 0 to 1, that choose other experts when the bias is rounded to bfloat16.
    ``rerouted_centred`` is the same share if the mean is subtracted before rounding. Both use random tokens of unit
    size and the router's own weights.
    """

    layer: str
    verdict: str  # kept, rounded, lost, not named, not finite, zero
    dtype: str | None = None
    low: float | None = None
    high: float | None = None
    num_experts: int | None = None
    distinct: int | None = None  # different values, as saved
    distinct_bfloat16: int | None = None
    fits_bfloat16: bool = False  # kept, and rounding to bfloat16 changes no value
    rerouted: float | None = None
    rerouted_centred: float | None = None

    def table_row(self) -> tuple[str, ...]:
        def text(value: float | None, form: str) -> str:
            return "" if value is None else format(value, form)

        return (
            self.layer,
            self.verdict,
            self.dtype or "",
            text(self.low, ".4f"),
            text(self.high, ".4f"),
            text(self.num_experts, "d"),
            text(self.distinct, "d"),
            text(self.distinct_bfloat16, "d"),
            text(self.rerouted, ".1%"),
            text(self.rerouted_centred, ".1%"),
        )


@dataclass(frozen=True)
class ExportCheck:
    """The biases of a checkpoint, layer by layer, with notes for the reader."""

    path: str
    family: str
    layers: tuple[LayerCheck, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def survived(self) -> bool:
        """Whether every layer has a finite bias in 32 bits or more. Zeros count as survived: they were never moved."""
        return all(layer.verdict in ("kept", "zero") for layer in self.layers)


def check_export(folder: str | Path) -> ExportCheck:
    """Checks the biases saved in a Transformers checkpoint (config.json and safetensors) or in a run of the lab.

    A family with a slot must keep its bias there in float32. For other families the biases are read from
    ``equipoise_biases.safetensors`` beside the weights.

    Raises ``UsageError`` if ``folder`` is not such a checkpoint, ``EquipoiseError`` if the model has no known router or
    if a part of its weights is missing.
    """
    file = read_config(model_folder(Path(folder)))
    folder = file.folder
    weights = find_weights(folder)
    weights.require(folder)
    if any(path.suffix != ".safetensors" for path in weights.files):
        raise UsageError(
            f"MODEL must hold safetensors: {folder} holds {weights.files[0].name}. Save the model with "
            "save_pretrained, which writes them."
        )
    checkpoint = _Checkpoint(file, weights)
    structure = build_structure(file, weights.dtypes)
    model = structure.model
    names = {module: name for name, module, _ in named_modules(model)}
    checks = []
    for layer in find_routers(model):
        # if config.json does not name the file, it counts only for biases that no slot can hold
        reads_file = checkpoint.config_names_biases or (
            checkpoint.biases is not None and (layer.slot is None or checkpoint.multiplies)
        )
        if reads_file:
            bias = (checkpoint.biases or {}).get(layer.name)
            check = _check(layer, bias, checkpoint.router_weight(layer), checkpoint.multiplies)
            is_named = checkpoint.config_names_biases or check.verdict != "kept"
            checks.append(check if is_named else replace(check, verdict="not named"))
        elif layer.slot is not None:
            key = f"{names[layer.slot.holder]}.{layer.slot.name}".lstrip(".")
            checks.append(_check(layer, checkpoint.tensor(key), checkpoint.router_weight(layer)))
    notes = (*_notes(checks, checkpoint), *structure.notes)
    return ExportCheck(str(folder), str(model.config.model_type), tuple(checks), notes)


class _Checkpoint:
    """The tensors of a folder by name. Each is read on request."""

    def __init__(self, config: ConfigFile, weights: Weights):
        self._file_of: dict[str, Path] = {}
        for file in weights.files:
            with safe_open(file, framework="pt") as tensors:
                self._file_of.update(dict.fromkeys(tensors.keys(), file))
        self.biases: Mapping[str, Tensor] | None = None
        self.multiplies = False
        if (config.folder / BIASES_FILE).exists():
            self.biases, self.multiplies = read_biases(config.folder)
        self.config_names_biases = "equipoise" in config.content

    def tensor(self, key: str) -> Tensor | None:
        """The tensor called ``key``, or the only one that is called the same from ``layers.N.`` on.

        Wrappers and conversions change the beginning of a name.
        """
        if key not in self._file_of:
            *_, tail = re.split(r"(?=layers\.\d+\.)", key, maxsplit=1)
            same_tail = [name for name in self._file_of if name.endswith(tail)]
            if len(same_tail) != 1:
                return None
            (key,) = same_tail
        with safe_open(self._file_of[key], framework="pt") as tensors:
            return tensors.get_tensor(key)

    def router_weight(self, layer: MoELayer) -> Float[Tensor, "experts dim"] | None:
        for name, parameter in layer.router.named_parameters():
            if parameter.dim() == 2 and parameter.shape[0] == layer.num_experts:
                return self.tensor(f"{layer.name}.{name}")
        return None


def _check(layer: MoELayer, bias: Tensor | None, weight: Tensor | None, multiplies: bool = False) -> LayerCheck:
    if bias is None:
        return LayerCheck(layer.name, "lost", num_experts=layer.num_experts)
    values = bias.reshape(-1).float()
    rounded = values.bfloat16().float()
    centred = (1 + values) / (1 + values.mean()) - 1 if multiplies else values - values.mean()
    verdict = "kept"
    if not values.isfinite().all():
        verdict = "not finite"
    elif not values.any():
        verdict = "zero"
    elif torch.finfo(bias.dtype).bits < 32:
        verdict = "rounded"
    rerouted = rerouted_centred = None
    if verdict == "kept":
        rerouted = _rerouted(layer, weight, values, rounded, multiplies)
        rerouted_centred = _rerouted(layer, weight, values, centred.bfloat16().float(), multiplies)
    return LayerCheck(
        layer=layer.name,
        verdict=verdict,
        dtype=str(bias.dtype).removeprefix("torch."),
        low=float(values.min()),
        high=float(values.max()),
        num_experts=layer.num_experts,
        distinct=len(values.unique()),
        distinct_bfloat16=len(rounded.unique()),
        fits_bfloat16=verdict == "kept" and torch.equal(values, rounded),
        rerouted=rerouted,
        rerouted_centred=rerouted_centred,
    )


def _rerouted(
    layer: MoELayer, weight: Tensor | None, bias: Tensor, other_bias: Tensor, multiplies: bool
) -> float | None:
    """The share of random tokens of unit size that the two biases send to different experts."""
    if weight is None:
        return None
    hidden = torch.randn(TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    logits = hidden @ weight.float().T
    first, second = (_choose(layer, logits, bias, multiplies).sort(-1).values for bias in (bias, other_bias))
    return float((first != second).any(-1).double().mean())


def _choose(layer: MoELayer, logits: Tensor, bias: Tensor, multiplies: bool) -> Tensor:
    if multiplies:
        return (score(logits, layer.kind.score_function) * (1 + bias)).topk(layer.k).indices
    if layer.kind.selection == "logits":
        return (logits + bias).topk(layer.k).indices
    num_groups, top_groups = (getattr(layer.router, name, None) or 1 for name in ("num_group", "topk_group"))
    return route(
        logits,
        layer.k,
        score_function=layer.kind.score_function,
        bias=bias,
        num_groups=num_groups,
        top_groups=top_groups,
    ).expert_ids


def _notes(layers: list[LayerCheck], checkpoint: _Checkpoint) -> Iterator[str]:
    count = {verdict: sum(layer.verdict == verdict for layer in layers) for verdict in ("lost", "rounded", "zero")}
    fit_bfloat16 = sum(layer.fits_bfloat16 for layer in layers)
    if not layers:
        yield (
            f"This family has no slot for a bias, and there is no {BIASES_FILE} beside the weights: no bias steers the "
            "choice of experts."
        )
    if checkpoint.config_names_biases and checkpoint.biases is None:
        yield (
            f"config.json names saved biases, but {BIASES_FILE} is missing. Copy it, or the model routes differently "
            "than in training."
        )
    elif checkpoint.biases is not None and any(layer.verdict == "not named" for layer in layers):
        yield (
            f"{BIASES_FILE} lies beside the weights, but config.json does not name it, so attach does not read it. "
            "Call balance.save_biases(folder) after model.save_pretrained(folder), or pass biases=MODEL."
        )
    elif count["lost"]:
        yield f"{count['lost']} of {len(layers)} layers have no bias here: it was left out when the model was saved."
    if count["rounded"]:
        yield (
            f"{count['rounded']} of {len(layers)} layers hold the bias in 16 bits. What rounding removed cannot be "
            "recovered: save the model again from training, with the bias in float32."
        )
    if count["zero"]:
        yield (
            f"{count['zero']} of {len(layers)} layers hold zeros: these biases were never moved, or were lost earlier."
        )
    if fit_bfloat16:
        yield (
            f"{fit_bfloat16} of {len(layers)} layers are saved in 32 bits, but every value fits bfloat16: they may "
            "have been rounded before they were saved."
        )
    shares = [layer.rerouted for layer in layers if layer.rerouted is not None]
    centred = [layer.rerouted_centred for layer in layers if layer.rerouted_centred is not None]
    if shares and max(shares) > 0:
        better = f"; with the mean subtracted first, which changes no choice, {max(centred):.1%}"
        yield (
            f"An engine that loads the bias in bfloat16 sends {max(shares):.1%} of random tokens to other experts in "
            f"the worst layer{better if max(centred) < max(shares) else ''}. Load it in float32."
        )
    if layers and checkpoint.biases is not None:
        yield (
            f"{BIASES_FILE} lies beside the weights: plain Transformers and inference engines route without these "
            f'biases; equipoise.attach(model, "{frozen_strategy(checkpoint.multiplies)}", biases=MODEL) routes '
            "with them."
        )
