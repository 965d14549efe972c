"""Models of the lab: real architectures of Transformers, built small from a config."""

from typing import Any

import torch
from torch import nn

from equipoise.errors import EquipoiseError
from equipoise.nn import Router
from equipoise.routers.find import find_routers
from equipoise.saved import BIASES_FILE
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
    """Transformers' name for the attention of sequences of this many tokens.

    With short sequences on a CPU the plain one is quicker than torch's fused one: a step of the lab's default model
    takes 0.83 of the time (``benchmarks/attention.py``). Long sequences need the memory that the fused one saves.
    """
    return "eager" if length <= 256 and not torch.cuda.is_available() else "sdpa"


def build_model(config: Train, vocab_size: int) -> nn.Module:
    """The model of a run, its fresh weights drawn from the seed. The same seed gives the same weights, bit for bit."""
    from equipoise.integrations.experts import use_quick_experts

    model = _fresh_or_saved(config, vocab_size)
    use_quick_experts(model)
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
            _change_gate(model, config.score_function)
        return model
    files = [*config.model.glob("*.safetensors"), *config.model.glob("pytorch_model*.bin")]
    has_weights = any(file.name != BIASES_FILE for file in files)
    auto, missing = AutoModelForCausalLM, set()
    try:  # the weights that AdamW moves are float32, whatever they were saved in
        if has_weights:
            model, info = auto.from_pretrained(config.model, dtype=torch.float32, output_loading_info=True)
            missing = info["missing_keys"]
        else:
            model = auto.from_config(AutoConfig.from_pretrained(config.model), dtype=torch.float32)
    except Exception as error:  # whatever a damaged or foreign folder makes of Transformers
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise EquipoiseError(
            f"--model must be a causal language model of Transformers: {config.model}: {reason} Restore the folder, or "
            "choose another."
        ) from None
    if missing:
        raise EquipoiseError(
            f"--model must hold all of its weights: {config.model} lacks {len(missing)}, as {min(missing)}. Restore "
            "them, or remove all weights to begin from fresh ones."
        )
    rows = model.get_input_embeddings().num_embeddings
    if rows < vocab_size:
        raise EquipoiseError(
            f"--model must have an embedding for every token: it has {rows}, the tokenizer {vocab_size} tokens. Pass "
            "the model's own tokenizer with --tokenizer."
        )
    return model


def _change_gate(model: nn.Module, score_function: str) -> None:
    """Gives every layer a router of ``score_function``, with the weight that its own had. No random number is used up, so runs of
    a seed differ by the score function only; under bfloat16 autocast also by the logits, which this router takes in float32."""
    for name, old, _, *_ in find_routers(model):
        assert isinstance(old.weight, nn.Parameter)
        num_experts, dim = old.weight.shape
        with torch.random.fork_rng(devices=[]):
            router = Router(dim, num_experts, old.top_k, score_function=score_function, renormalise=True)  # type: ignore[arg-type]
        router.weight = old.weight
        model.set_submodule(name, router)


def num_active_parameters(model: nn.Module, k: int, num_experts: int) -> int:
    """Parameters that one token uses: all but the experts that it was not sent to, whose weights are stored as one."""
    total = 0
    for name, parameter in model.named_parameters():
        is_expert = ".experts." in name and parameter.dim() > 1 and parameter.shape[0] == num_experts
        total += parameter.numel() * k // num_experts if is_expert else parameter.numel()
    return total
