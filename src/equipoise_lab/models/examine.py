"""What ``attach`` finds in one model on this disk: its layers, how they select, and the counts of a random batch."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equipoise.attachment import attach
from equipoise.errors import EquipoiseError
from equipoise.metrics import max_violation
from equipoise.routers.find import find_routers, hash_routers, unknown_routers
from equipoise.saved import BIASES_FILE, names_biases
from equipoise_lab.models.load import LoadedModel, load_model

__all__ = ["ExaminedLayer", "ExaminedModel", "examine"]

MAX_PARAMETERS = 2_000_000_000  # of a larger model no weights are read, and no batch is run
BATCH = (4, 64)  # sequences and their length


@dataclass(frozen=True)
class ExaminedLayer:
    """One layer. ``load`` and ``maxvio`` are None if no batch was run."""

    name: str
    num_experts: int  # including zero_experts, which compute nothing
    zero_experts: int
    k: int
    score_function: str
    selection: str
    slot: str | None
    load: list[int] | None
    maxvio: float | None


@dataclass(frozen=True)
class ExaminedModel:
    """A model that ``attach`` accepts."""

    model: str  # the name of its class
    model_type: str
    num_parameters: int
    weights: str  # "loaded" or "none"
    layers: list[ExaminedLayer]
    notes: list[str]


def examine(path: Path) -> ExaminedModel:
    """Builds a Transformers model from its folder or its config.json and attaches; runs one random batch if it has
    weights.

    Raises ``UsageError`` with the reason if the model cannot be attached: unknown type, own code only, no known layer.
    """
    loaded = load_model(path, max_parameters=MAX_PARAMETERS)
    biases = loaded.folder / BIASES_FILE
    if names_biases(loaded.model) and not biases.is_file():
        loaded.notes.append(
            f"config.json names {BIASES_FILE}, but the file is missing: attach refuses a strategy with biases until "
            "you copy it back or pass biases=..."
        )
    elif biases.is_file() and loaded.has_weights:
        loaded.notes.append(f"the batch was routed without the biases of {BIASES_FILE}")
    return _attach_and_run(loaded)


def _attach_and_run(loaded: LoadedModel) -> ExaminedModel:
    model, notes = loaded.model, loaded.notes
    log = logging.getLogger("equipoise")
    level = log.level
    log.setLevel(logging.ERROR)  # the notes say what attach would warn about
    try:
        moe_layers = find_routers(model)
        balance = attach(model)
        notes += [f"{name} is neither counted nor balanced" for name in unknown_routers(model)]
        notes += [f"no bias steers {layer.name}: {layer.obstacle}" for layer in moe_layers if layer.obstacle]
        notes += [f"{name} is a hash layer: neither counted nor balanced" for name in hash_routers(model)]
    finally:
        log.setLevel(level)
    load: dict[str, torch.Tensor] = {}
    if loaded.has_weights:
        try:
            with torch.no_grad(), balance.measuring() as load:
                model.eval()(**_batch(loaded.config))
        except Exception as error:
            raise EquipoiseError(
                f"the model must run on token ids alone: {type(model).__name__} raises {type(error).__name__}: {error}."
                f" attach itself works and finds {len(moe_layers)} routers; only the batch of random tokens failed."
            ) from None
    layers = [
        ExaminedLayer(
            layer.name,
            layer.num_experts,
            loaded.zero_experts[layer.name],
            layer.k,
            layer.kind.score_function,
            layer.kind.selection,
            layer.kind.slot,
            load[layer.name].tolist() if load else None,
            float(max_violation(load[layer.name])) if load and load[layer.name].any() else None,
        )
        for layer in moe_layers
    ]
    weights = "loaded" if loaded.has_weights else "none"
    return ExaminedModel(type(model).__name__, loaded.config.model_type, loaded.num_parameters, weights, layers, notes)


def _batch(config: Any) -> dict[str, torch.Tensor]:
    """Random token ids, for the decoder too if there is one."""
    text = config.get_text_config()
    ids = torch.randint(text.vocab_size, BATCH, generator=torch.Generator().manual_seed(0))
    max_length = getattr(text, "max_position_embeddings", None) or BATCH[1]
    ids = ids[:, :max_length]
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else {"input_ids": ids}
