"""Tiny models of any family of Transformers: its default config with every known size lowered, and random routers."""

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, int] = {  # by the suffix of an attribute's name; the longest suffix applies
    "vocab_size": 64,
    "vocab_size_per_layer_input": 64,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "d_model": 32,
    "embed_dim": 32,
    "emb_dim": 32,
    "intermediate_size": 16,
    "intermediate_dim": 16,
    "intermediate_size_mlp": 16,
    "ffn_hidden_size": 16,
    "ffn_dim": 16,
    "d_ff": 16,
    "num_hidden_layers": 1,
    "num_layers": 1,
    "n_layers": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "n_heads": 2,
    "num_key_value_heads": 2,
    "kv_n_heads": 2,
    "global_key_value_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "attention_projection_dim": 16,
    "lora_rank": 16,
    "lora_dim": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "nope_head_dim": 8,
    "rope_head_dim": 8,
    "v_head_dim": 16,
    "qk_head_dim": 16,
    "num_experts": 8,
    "routed_experts": 8,
    "local_experts": 8,
    "experts_per_tok": 2,
    "experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_group": 1,
    "expert_group": 1,
    "n_groups_of_experts": 1,
    "topk_group": 1,
    "shared_experts": 1,
    "mamba_expand": 1,
    "mamba_d_state": 8,
    "mamba_n_heads": 2,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "state_size": 8,
    "chunk_size": 8,
    "index_topk": 4,
    "max_position_embeddings": 64,
    "max_seq_len": 64,
    "sliding_window": 8,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FULL, INDEXED = ["full_attention"], ["indexed_attention"]
EXTRA_OPTIONS: dict[str, dict[str, Any]] = {  # by model type, settings beyond SIZES
    "Qwen3OmniMoeTalkerTextTopKRouter": {"shared_expert_intermediate_size": 16},
    "deepseek_ocr2": {"mlp_layer_types": ["sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma": {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note": {"head_dim": 32},
    "ernie4_5_vl_moe": {
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [2, 2, 4]},
        "moe_intermediate_size": [16, 8],
    },
    "ernie4_5_moe": {"moe_layer_start_index": 0, "moe_layer_end_index": 0},
    "gemma4": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 16},
    "glm5_next": {"layer_types": INDEXED, "qk_rope_head_dim": 0, "head_dim": 0, "index_kpool": 2},
    "glm4v_moe": {
        "rope_parameters": {
            "rope_theta": 1e4,
            "partial_rotary_factor": 0.5,
            "rope_type": "default",
            "mrope_section": [2, 1, 1],
        }
    },
    "granitemoehybrid": {"layer_types": FULL},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"expert_layer_offset": 0, "expert_layer_period": 1, "attn_layer_offset": 0, "attn_layer_period": 1},
    "kimi_linear": {"layer_types": FULL},
    "lfm2_moe": {"layer_types": FULL},
    "llama4": {"moe_layers": [0], "num_experts_per_tok": 1},
    "mistral_large4": {"no_rope_layers": [1], "kv_source_layers": [0]},
    "nemotron_h": {"layers_block_type": ["full_attention", "moe"]},
    "qwen4_exp": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 1,
    },
    "step3p7": {"sliding_window": 8},
}


def _lowered(name: str, value: Any) -> Any:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | list)
        or (isinstance(value, list) and "token_id" not in name)
    ):
        return value
    suffixes = [suffix for suffix in SIZES if name == suffix or name.endswith(f"_{suffix}")]
    return SIZES[max(suffixes, key=len)] if suffixes else value


def shrink(config: Any) -> Any:
    """Lowers the known sizes in a config and in configs inside it. Lists with one entry per layer keep the last."""
    layers = next((v for n in ("num_hidden_layers", "n_layers") if (v := vars(config).get(n)) is not None), None)
    if (rope := vars(config).get("qk_rope_head_dim")) is not None and vars(config).get("head_dim") == rope:
        config.head_dim = SIZES["qk_rope_head_dim"]  # the two are the same size
    for name, value in list(vars(config).items()):
        if name == "head_dim" and value == SIZES["qk_rope_head_dim"]:
            continue
        if name.startswith("_"):
            continue
        if hasattr(value, "to_dict"):
            shrink(value)
        elif name == "mlp_only_layers":
            setattr(config, name, [])
        elif isinstance(value, list) and layers is not None and len(value) == layers and layers > 1:
            setattr(config, name, value[-1:])
        else:
            lowered = _lowered(name, value)
            if lowered != value:
                setattr(config, name, lowered)
    return config


class _Hidden(nn.Module):
    """Adds a head to a model without one: its embeddings, applied to both streams if it has two."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner, self.config = inner, inner.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        inputs = {}
        if hasattr(self.config, "canvas_length"):  # by default drawn at random
            inputs["decoder_input_ids"] = input_ids
        output = self.inner(input_ids=input_ids, attention_mask=attention_mask, **inputs)
        streams = (output.last_hidden_state, getattr(output, "encoder_last_hidden_state", None))
        hidden = torch.cat([hidden_states for hidden_states in streams if hidden_states is not None], dim=1)
        return hidden @ self.inner.get_input_embeddings().weight.T


class _Blocks(nn.Module):
    """Two blocks of a family after an embedding, for blocks that no text model contains."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.embed = nn.Embedding(SIZES["vocab_size"], SIZES["hidden_size"])
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + block(x)
        return x


class _Experts(nn.Module):
    """A router that no block of its family contains, before experts that are one number per channel."""

    def __init__(self, gate: nn.Module, num_experts: int):
        super().__init__()
        self.gate = gate
        self.scales = nn.Parameter(torch.linspace(0.5, 1.5, num_experts)[:, None].repeat(1, SIZES["hidden_size"]))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        _, weights, expert_ids = self.gate(flat)
        return (flat * (self.scales[expert_ids] * weights[..., None]).sum(-2)).view_as(x)


PARTS = {  # router classes outside the text model: (package, class of the block, class of the config)
    "Dots3NoteVisionTopKRouter": ("dots3_note", "Dots3NoteVisionMoE", "Dots3NoteVisionConfig"),
    "Qwen3OmniMoeThinkerTextTopKRouter": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeThinkerTextSparseMoeBlock",
        "Qwen3OmniMoeTextConfig",
    ),
    "Qwen3OmniMoeTalkerTextTopKRouter": (
        "qwen3_omni_moe",
        "Qwen3OmniMoeTalkerTextSparseMoeBlock",
        "Qwen3OmniMoeTalkerTextConfig",
    ),
    "Qwen3OmniMoeTextTopKRouter": ("qwen3_omni_moe", None, "Qwen3OmniMoeTextConfig"),
}


def build_part(router: str) -> nn.Module:
    """A router class of ``PARTS`` within two blocks."""
    package, block, config_class = PARTS[router]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    config = getattr(importlib.import_module(f"transformers.models.{package}"), config_class)()
    for part_config in [config, *getattr(config, "per_layer_config", [])]:
        shrink(part_config)
        for name, value in EXTRA_OPTIONS.get(router, {}).items():
            setattr(part_config, name, value)
        part_config._experts_implementation = "eager"
    torch.manual_seed(0)
    if block is None:
        blocks = [_Experts(getattr(module, router)(config), SIZES["num_experts"]) for _ in range(2)]
    else:
        layer = {"layer_idx": 0} if "layer_idx" in inspect.signature(getattr(module, block)).parameters else {}
        blocks = [getattr(module, block)(config, **layer) for _ in range(2)]
    for parameter in nn.ModuleList(blocks).parameters():
        nn.init.normal_(parameter, std=0.1)
    return _ready(_Blocks(blocks))


def build(model_type: str, **options: Any) -> nn.Module:
    """A tiny causal language model of a family; of a multimodal model, its text part. ``options`` set attributes of the
    config, without lowering."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type)
    for shrunk in (config, config.get_text_config()):
        shrink(shrunk)
        for name, value in {**EXTRA_OPTIONS.get(model_type, {}), **options}.items():
            if hasattr(shrunk, name):
                setattr(shrunk, name, value)
    torch.manual_seed(0)
    text = config.get_text_config()
    candidates = ((AutoModelForCausalLM, config), (AutoModelForCausalLM, text), (AutoModel, text), (AutoModel, config))
    auto, shrunk = next((auto, shrunk) for auto, shrunk in candidates if type(shrunk) in auto._model_mapping)
    shrunk._attn_implementation = shrunk._experts_implementation = "eager"
    model = auto.from_config(shrunk)
    return _ready(_Hidden(model) if auto is AutoModel else model)


def _ready(model: nn.Module) -> nn.Module:
    """In training mode, with routers that prefer some experts to others."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if type(module).__name__.endswith(("Router", "Gate", "Gating")):
            for name, parameter in module.named_parameters():
                if parameter.dim() == 2 and "bias" not in name:
                    nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.train()


def batch() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, SIZES["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(0))}
