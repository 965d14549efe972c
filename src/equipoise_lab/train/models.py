"""Builds the models of the lab: real architectures of Transformers, small."""

from typing import Any

import torch
from torch import nn

from equipoise.errors import EquipoiseError
from equipoise.nn import Router
from equipoise.routers.find import find_routers
from equipoise_lab.models.weights import NO_WEIGHTS, find_weights
from equipoise_lab.train.config import SCORE_FUNCTIONS, Train

__all__ = ["build_model", "num_active_parameters"]


def _small_config(config: Train, vocab_size: int) -> dict[str, Any]:
    common: dict[str, Any] = dict(
        vocab_size=vocab_size,
        hidden_size=config.width,
        intermediate_size=config.expert_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.width // 32,
        num_key_value_heads=config.width // 32,
        num_experts_per_tok=config.experts_per_token,
        max_position_embeddings=config.sequence_length,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    deepseek = dict(
        moe_intermediate_size=config.expert_width,
        n_routed_experts=config.experts,
        n_shared_experts=1,
        first_k_dense_replace=0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    )
    special: dict[str, dict[str, Any]] = {
        "glm4_moe": deepseek | dict(head_dim=32, num_mtp_layers=0, use_qk_norm=config.qk_norm),
        "deepseek_v3": deepseek
        | dict(q_lora_rank=None, kv_lora_rank=64, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32),
        "qwen3_moe": dict(
            moe_intermediate_size=config.expert_width, num_experts=config.experts, head_dim=32, norm_topk_prob=True
        ),
        "olmoe": dict(num_experts=config.experts),
        "mixtral": dict(num_local_experts=config.experts),
    }
    return common | special[config.arch]


def attention_for(length: int) -> str:
    """Transformers' name of the attention implementation for sequences of ``length`` tokens.

    For short sequences on a CPU, plain attention is faster than torch's fused attention: a step of the lab's default
    model takes 0.82 of the time (docs/evidence/speed_lab.md). Long sequences need the memory that fused attention
    saves.
    """
    return "eager" if length <= 256 and not torch.cuda.is_available() else "sdpa"


def build_model(config: Train, vocab_size: int) -> nn.Module:
    """Builds the model of a run. The same seed gives the same fresh weights, bit for bit."""
    from equipoise_lab.train.fast_experts import use_fast_experts

    model = _fresh_or_saved(config, vocab_size)
    use_fast_experts(model)
    return model


def _fresh_or_saved(config: Train, vocab_size: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(config.seed)
    if config.model is None:
        small = AutoConfig.for_model(config.arch, **_small_config(config, vocab_size))
        model = AutoModelForCausalLM.from_config(small, attn_implementation=attention_for(config.sequence_length))
        if config.score_function not in ("auto", SCORE_FUNCTIONS[config.arch]):
            _change_score_function(model, config.score_function)
        return model
    weights = find_weights(config.model)
    if not weights.files and weights.reason != NO_WEIGHTS:
        raise EquipoiseError(
            f"--model must contain all of its weights: {config.model}: {weights.reason}. Restore them, or remove all "
            "weight files to start from fresh weights."
        )
    auto, missing = AutoModelForCausalLM, set()
    try:  # AdamW trains float32 weights, whatever dtype they were saved in
        if weights.files:
            model, info = auto.from_pretrained(config.model, dtype=torch.float32, output_loading_info=True)
            missing = info["missing_keys"]
        else:
            model = auto.from_config(AutoConfig.from_pretrained(config.model), dtype=torch.float32)
    except Exception as error:  # Transformers fails in many ways on a damaged or foreign folder
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EquipoiseError(
            f"--model must be a causal language model of Transformers: {config.model}: {reason} Restore the folder, or "
            "choose another."
        ) from None
    if missing:
        raise EquipoiseError(
            f"--model must contain all of its weights: {config.model} lacks {len(missing)}, for example "
            f"{min(missing)}. Restore them, or remove all weight files to start from fresh weights."
        )
    rows = model.get_input_embeddings().num_embeddings
    if rows < vocab_size:
        raise EquipoiseError(
            f"--model must have an embedding for every token: it has {rows} embeddings, and the tokenizer has "
            f"{vocab_size} tokens. Give the model's own tokenizer with --tokenizer."
        )
    return model


def _change_score_function(model: nn.Module, score_function: str) -> None:
    """Replaces every router by one with ``score_function`` and the same weight.

    It uses no random numbers, so runs with the same seed only differ in the score function. Under bfloat16 autocast
    they also differ in the logits: this router computes them in float32.
    """
    for name, old, _, *_ in find_routers(model):
        assert isinstance(old.weight, nn.Parameter)
        num_experts, dim = old.weight.shape
        with torch.random.fork_rng(devices=[]):
            router = Router(
                dim,
                num_experts,
                old.top_k,  # type: ignore[arg-type]
                score_function=score_function,  # type: ignore[arg-type]
                renormalise=True,
            )
        router.weight = old.weight
        model.set_submodule(name, router)


def num_active_parameters(model: nn.Module, k: int, num_experts: int) -> int:
    """Number of parameters that one token uses: everything but the experts that it is not sent to.

    The weights of a layer's experts are stored in one tensor.
    """
    total = 0
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name and parameter.dim() > 1 and parameter.shape[0] == num_experts
        total += parameter.numel() * k // num_experts if is_expert else parameter.numel()
    return total
