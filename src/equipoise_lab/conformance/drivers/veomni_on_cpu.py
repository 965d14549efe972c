"""VeOmni on a CPU: small models of its own, with plain torch in place of kernels for GPUs, by its options.

In 0.1.11 alone, replaces ``veomni.data.multimodal``, which reads images and videos by libraries that need ffmpeg.
A scenario of one rank gets a process group of one rank, as ``torchrun`` gives it. VeOmni shards the model on two ranks;
that of one rank is made on the CPU.
"""

import importlib.util
import sys
import tempfile
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch.distributed.tensor import DTensor, distribute_tensor
from veomni.arguments.arguments_types import MixedPrecisionConfig, OpsImplementationConfig
from veomni.distributed import parallel_state
from veomni.distributed.torch_parallelize import build_parallelize_model
from veomni.models import build_foundation_model

from equipoise_lab.conformance.driver import Layer

__all__ = ["VOCABULARY", "PackingCollator", "loaded", "model_of", "start_ranks", "whole"]

if importlib.util.find_spec("av") is None and not hasattr(parallel_state, "clear_parallel_state"):
    parts = ("", ".multimodal_chat_template")
    sys.modules.update({f"veomni.data.multimodal{part}": mock.MagicMock() for part in parts})
from veomni.data.data_collator import PackingCollator

VOCABULARY = 32
EAGER = {
    name: "eager"
    for name in OpsImplementationConfig.__dataclass_fields__
    if name.endswith("_implementation") and name != "qat_implementation"
}
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "intermediate_size": 8,
    "moe_intermediate_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
SIZES_QWEN3 = {"architectures": ["Qwen3MoeForCausalLM"], "head_dim": 4, "router_aux_loss_coef": 1.0}
SIZES_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "first_k_dense_replace": 0,
    "q_lora_rank": 4,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
}


def start_ranks() -> Any:
    """Its parallel state for the process group that is there."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if hasattr(parallel_state, "clear_parallel_state"):
        parallel_state.clear_parallel_state()  # that of the scenario before
    parallel_state._PARALLEL_STATE = None
    ranks = dist.get_world_size()
    parallel_state.init_parallel_state(dp_size=ranks, dp_shard_size=ranks, dp_mode="fsdp2", device_type="cpu")
    return parallel_state.get_parallel_state()


def model_of(layer: Layer) -> Any:
    """Its Qwen3 MoE; its DeepSeek-V3 for expert groups or a given bias. Gates are the identity, and experts give 0."""
    sizes: dict[str, Any] = {"hidden_size": layer.experts, "num_experts_per_tok": layer.k, **SIZES}
    sizes |= {"num_hidden_layers": layer.number, "norm_topk_prob": layer.normalises_weights}
    if layer.groups or layer.bias is not None:
        groups, open_groups = layer.groups or (1, 1)
        sizes |= {
            "n_routed_experts": layer.experts,
            "n_group": groups,
            "topk_group": open_groups,
            "n_shared_experts": 1,
        }
        config = transformers.AutoConfig.for_model("deepseek_v3", **SIZES_V3, **sizes)
    else:
        sizes |= {"num_experts": layer.experts, "output_router_logits": not layer.sets_coefficient_only}
        config = transformers.AutoConfig.for_model("qwen3_moe", **SIZES_QWEN3, **sizes)
    is_sharded = dist.get_world_size() > 1
    device: Any = "meta" if is_sharded else "cpu"
    model = build_foundation_model(
        config, torch_dtype="float32", init_device=device, ops_implementation=OpsImplementationConfig(**EAGER)
    )
    if is_sharded:
        model = build_parallelize_model(
            model,
            init_device=device,
            mixed_precision=MixedPrecisionConfig(enable=False),
            enable_gradient_checkpointing=False,
            basic_modules=list(model._no_split_modules),
        )
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, 0.1)
        for block in model.model.layers:
            torch.nn.init.zeros_(block.mlp.experts.down_proj)
            weight, identity = block.mlp.gate.weight, torch.eye(layer.experts)
            is_shard = isinstance(weight, DTensor)
            weight.copy_(distribute_tensor(identity, weight.device_mesh, weight.placements) if is_shard else identity)
            if layer.groups or layer.bias is not None:
                block.mlp.gate.e_score_correction_bias.copy_(torch.tensor(layer.bias or [0.0] * layer.experts))
    return model


def loaded(model: Any, dtype: torch.dtype) -> Any:
    """The model, saved and loaded as weights of this type."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return build_foundation_model(
            folder,
            weights_path=folder,
            torch_dtype=str(dtype).removeprefix("torch."),
            init_device="cpu",
            ops_implementation=OpsImplementationConfig(**EAGER),
        )


def whole(value: Any) -> Any:
    """All of a tensor that may be sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value
