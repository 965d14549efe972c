"""Did the balancing bias survive in a saved checkpoint? Its tensors are read one by one, the model is not built.

A bias that steers the choice of experts is lost in many ways on the way out of training: left out, saved in 16 bits, or
rounded when it is loaded. Biases of one layer differ by little, so 16 bits leave only a few different values of a bias
that sits far from zero, and most tokens go elsewhere. Subtracting the mean changes no choice and keeps the bits.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.find import FoundRouter, find_routers, plain_name
from equipoise.routing import route, score
from equipoise.saved import BIASES_FILE, frozen_strategy, model_folder, models_in, read_biases

__all__ = ["ExportCheck", "LayerCheck", "check_export"]

TOKENS = 4096


@dataclass(frozen=True)
class LayerCheck:
    """What a checkpoint holds of one router's bias.

    ``rerouted`` and ``rerouted_centred`` are shares of tokens, 0 to 1, that choose other experts when the bias is
    rounded to bfloat16, as it is and less its mean; on random tokens of unit size, by the router's own weights. None
    where the checkpoint does not hold what it takes.
    """

    layer: str
    verdict: str  # kept, rounded, lost, not named, not finite, zero
    dtype: str | None = None
    low: float | None = None
    high: float | None = None
    num_experts: int | None = None
    distinct: int | None = None  # values that differ, as they are held
    distinct_bfloat16: int | None = None
    fits_bfloat16: bool = False  # kept, and no value has more bits than bfloat16
    rerouted: float | None = None
    rerouted_centred: float | None = None

    def shown(self) -> tuple[str, ...]:
        """As a row of a table."""

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
    """A checkpoint's biases, layer by layer, and what to say of them."""

    path: str
    family: str
    layers: tuple[LayerCheck, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def survived(self) -> bool:
        """Whether every layer has a finite bias in 32 bits or more. One of zeros has survived: it was never moved."""
        return all(layer.verdict in ("kept", "zero") for layer in self.layers)


def check_export(folder: str | Path) -> ExportCheck:
    """Reads the biases of a Transformers checkpoint (config.json and safetensors), or of the one that a run of the lab
    left, and says whether they survived.

    Families with a slot must hold it in float32; of the others the biases beside the weights are read
    (``equipoise_biases.safetensors``). Raises ``UsageError`` for a folder that is no such checkpoint and
    ``EquipoiseError`` for a model without a router that is known.
    """
    folder = model_folder(Path(folder))
    held = _Checkpoint(folder)
    model = _empty_model(folder)
    routers = find_routers(model)
    names = {module: plain_name(name) for name, module in model.named_modules()}
    layers = []
    for router in routers:
        unnamed = held.biases is not None and (router.slot is None or held.multiplies)  # else the slot is what counts
        if router.slot is not None and not held.promised and not unnamed:
            key = f"{names[router.slot.holder]}.{router.slot.name}".lstrip(".")
            layers.append(_check(router, held.get(key), held.weight_of(router)))
        elif held.promised or unnamed:
            layer = _check(router, (held.biases or {}).get(router.name), held.weight_of(router), held.multiplies)
            named = held.promised or layer.verdict != "kept"
            layers.append(layer if named else replace(layer, verdict="not named"))
    return ExportCheck(str(folder), str(model.config.model_type), tuple(layers), tuple(_notes(layers, routers, held)))


def _empty_model(folder: Path) -> Any:
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise EquipoiseError("checking a checkpoint needs transformers: pip install 'equipoise[lab]'") from None
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a foreign config makes of Transformers
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"CHECKPOINT must be a causal language model of Transformers: {folder}: {reason} Give a folder that "
            "save_pretrained wrote."
        ) from None


class _Checkpoint:
    """The tensors of a folder, by name, read when they are asked for."""

    def __init__(self, folder: Path):
        try:
            from safetensors import safe_open
        except ImportError:
            raise EquipoiseError("checking a checkpoint needs safetensors: pip install safetensors.") from None
        self._open = safe_open
        if not (folder / "config.json").is_file():
            raise UsageError(
                f"CHECKPOINT must be a folder with a config.json: {folder} is not."
                + (models_in(folder) or " Give a saved model.")
            )
        files = [file for file in sorted(folder.glob("*.safetensors")) if file.name != BIASES_FILE]
        if not files:
            raise UsageError(
                f"CHECKPOINT must hold safetensors: {folder} holds none. Save the model with save_pretrained, which "
                "writes them."
            )
        self._file: dict[str, Path] = {}
        for file in files:
            with self._opened(file) as opened:
                self._file.update(dict.fromkeys(opened.keys(), file))
        self._check_index(folder)
        self.biases: Mapping[str, Tensor] | None = None
        self.multiplies = False
        if (folder / BIASES_FILE).exists():
            self.biases, self.multiplies = read_biases(folder)
        self.promised = "equipoise" in json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def _opened(self, file: Path) -> Any:
        try:
            return self._open(file, framework="pt", device="cpu")
        except Exception as error:  # safetensors raises its own
            raise EquipoiseError(f"{file} must be safetensors: {error}. The file is damaged; save it again.") from None

    def _check_index(self, folder: Path) -> None:
        for index in folder.glob("*.safetensors.index.json"):
            named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
            missing = sorted(name for name in named if not (folder / name).exists())
            if missing:
                raise EquipoiseError(
                    f"{folder} must hold every file that {index.name} names: {len(missing)} of {len(named)} are "
                    f"missing, as {missing[0]}. Copy them."
                )

    def get(self, key: str) -> Tensor | None:
        """The tensor of this name, or of the one name that differs in its beginning only."""
        if key not in self._file:
            *_, tail = re.split(r"(?=layers\.\d+\.)", key, maxsplit=1)
            alike = [name for name in self._file if name.endswith(tail)]
            if len(alike) != 1:
                return None
            (key,) = alike
        with self._opened(self._file[key]) as opened:
            return opened.get_tensor(key)

    def weight_of(self, router: FoundRouter) -> Float[Tensor, "experts dim"] | None:
        for name, parameter in router.module.named_parameters():
            if parameter.dim() == 2 and parameter.shape[0] == router.num_experts:
                return self.get(f"{router.name}.{name}")
        return None


def _check(router: FoundRouter, bias: Tensor | None, weight: Tensor | None, multiplies: bool = False) -> LayerCheck:
    if bias is None:
        return LayerCheck(router.name, "lost", num_experts=router.num_experts)
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
    return LayerCheck(
        layer=router.name,
        verdict=verdict,
        dtype=str(bias.dtype).removeprefix("torch."),
        low=float(values.min()),
        high=float(values.max()),
        num_experts=router.num_experts,
        distinct=len(values.unique()),
        distinct_bfloat16=len(rounded.unique()),
        fits_bfloat16=verdict == "kept" and torch.equal(values, rounded),
        rerouted=_rerouted(router, weight, values, rounded, multiplies) if verdict == "kept" else None,
        rerouted_centred=_rerouted(router, weight, values, centred.bfloat16().float(), multiplies)
        if verdict == "kept"
        else None,
    )


def _rerouted(
    router: FoundRouter, weight: Tensor | None, bias: Tensor, other: Tensor, multiplies: bool
) -> float | None:
    """The share of random tokens of unit size that choose otherwise by the other bias."""
    if weight is None:
        return None
    hidden = torch.randn(TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    logits = hidden @ weight.float().T
    first, second = (_choice(router, logits, bias, multiplies).sort(-1).values for bias in (bias, other))
    return float((first != second).any(-1).double().mean())


def _choice(router: FoundRouter, logits: Tensor, bias: Tensor, multiplies: bool) -> Tensor:
    if multiplies:
        return (score(logits, router.kind.score_function) * (1 + bias)).topk(router.k).indices
    if router.kind.selection == "logits":
        return (logits + bias).topk(router.k).indices
    groups, top = (getattr(router.module, name, None) or 1 for name in ("num_group", "topk_group"))
    return route(
        logits, router.k, score_function=router.kind.score_function, bias=bias, num_groups=groups, top_groups=top
    ).expert_ids


def _notes(layers: list[LayerCheck], routers: list[FoundRouter], held: _Checkpoint) -> Iterator[str]:
    count = {verdict: sum(layer.verdict == verdict for layer in layers) for verdict in ("lost", "rounded", "zero")}
    count["in bfloat16"] = sum(layer.fits_bfloat16 for layer in layers)
    if not layers:
        yield (
            f"This family has no slot for a bias, and no {BIASES_FILE} lies beside the weights: nothing steers its "
            "choice."
        )
    if held.promised and held.biases is None:
        yield (
            f"config.json names saved biases, and {BIASES_FILE} is not there: copy it, or the model routes otherwise "
            "than it was trained."
        )
    elif held.biases is not None and not held.promised and any(layer.verdict == "not named" for layer in layers):
        yield (
            f"{BIASES_FILE} lies beside the weights, and config.json does not name it: attach does not begin with it. "
            "Call balance.save_biases(folder) after model.save_pretrained(folder), or give biases=CHECKPOINT."
        )
    elif count["lost"]:
        yield f"{count['lost']} of {len(layers)} layers have no bias here: it was left out when the model was saved."
    if count["rounded"]:
        yield (
            f"{count['rounded']} of {len(layers)} layers hold it in 16 bits: what was rounded off cannot be had back. "
            "Save the model again from training, with the bias in float32."
        )
    if count["zero"]:
        yield f"{count['zero']} of {len(layers)} layers hold zeros: nothing moved them, or they were lost before."
    if count["in bfloat16"]:
        yield (
            f"{count['in bfloat16']} of {len(layers)} layers hold in 32 bits nothing that bfloat16 could not hold: "
            "they were perhaps rounded before they were saved."
        )
    shares = [layer.rerouted for layer in layers if layer.rerouted is not None]
    centred = [layer.rerouted_centred for layer in layers if layer.rerouted_centred is not None]
    if shares and max(shares) > 0:
        better = f"; with the mean subtracted first, which changes no choice, {max(centred):.1%}"
        yield (
            f"An engine that loads it in bfloat16 sends {max(shares):.1%} of random tokens elsewhere in the worst layer"
            f"{better if max(centred) < max(shares) else ''}. Load it in float32."
        )
    if layers and held.biases is not None:
        yield (
            f"{BIASES_FILE} lies beside the weights: plain Transformers and engines route without these biases; "
            f'equipoise.attach(model, "{frozen_strategy(held.multiplies)}", biases=CHECKPOINT) routes with them.'
        )
