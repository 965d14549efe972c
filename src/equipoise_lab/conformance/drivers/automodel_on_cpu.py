"""NeMo Automodel on a CPU: small models of its own, with plain torch in place of kernels for GPUs, by its options.

Replaces ``torch.cuda.current_device``, which its models call while they are built even where there is no GPU. No
router, loss or gradient is touched.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.models.deepseek_v3.model import DeepseekV3Config, DeepseekV3ForCausalLM
from nemo_automodel.components.models.deepseek_v4.model import DeepseekV4Config, DeepseekV4ForCausalLM
from nemo_automodel.components.models.qwen3_moe.model import Qwen3MoeConfig, Qwen3MoeForCausalLM
from nemo_automodel.components.moe.layers import Gate, MoE
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint

from equipoise_lab.conformance.driver import Layer, NotTried

__all__ = ["checkpoint_by", "expert_parallelism", "fully_shard", "model_of", "whole"]

torch.cuda.current_device = lambda: 0

BACKEND = BackendConfig(
    attn="sdpa",
    linear="torch",
    rms_norm="torch",
    experts="torch",
    dispatcher="torch",
    enable_hf_state_dict_adapter=False,
)
SIZES_QWEN3 = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 256}
SIZES_V3 = {
    "intermediate_size": 8,
    "num_attention_heads": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 256,
    "n_shared_experts": 0,
}
SIZES_V4 = {
    "num_attention_heads": 2,
    "head_dim": 8,
    "q_lora_rank": 8,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "compress_ratios": [0, 0],
    "num_hash_layers": 0,
    "max_position_embeddings": 256,
    "n_shared_experts": 0,
    "num_nextn_predict_layers": 1,
}


def model_of(layer: Layer, options: Mapping[str, Any]) -> Any:
    """Qwen3 MoE; with an expert bias DeepSeek-V3; with a prediction head DeepSeek-V4. Its gates are the identity.

    Args:
        layer: the sizes of its routers. On the rank without an MoE layer all are dense.
        options: what its YAML file has under ``model.moe_overrides``.
    """
    has_bias = layer.bias is not None or layer.bias_rate is not None
    is_dense = layer.rank_without is not None and dist.get_rank() == layer.rank_without
    sizes: dict[str, Any] = {"hidden_size": layer.experts, "num_experts_per_tok": layer.k, "vocab_size": 8}
    sizes |= {"norm_topk_prob": layer.normalises_weights, "moe_intermediate_size": 8, "dtype": torch.float32}
    if layer.has_prediction_head:
        sizes |= {"n_routed_experts": layer.experts, "num_hidden_layers": layer.number - 1}
        config, kind = DeepseekV4Config(**SIZES_V4, **sizes), DeepseekV4ForCausalLM
    elif has_bias:
        sizes |= {"n_routed_experts": layer.experts, "num_hidden_layers": layer.number}
        config, kind = DeepseekV3Config(**SIZES_V3, **sizes, first_k_dense_replace=int(is_dense)), DeepseekV3ForCausalLM
    else:
        sizes |= {"num_experts": layer.experts, "num_hidden_layers": layer.number}
        config, kind = Qwen3MoeConfig(**SIZES_QWEN3, **sizes), Qwen3MoeForCausalLM
    model = kind(config, None, BACKEND, moe_overrides=dict(options))
    model.initialize_weights(torch.device("cpu"), torch.float32)
    for module in model.modules():
        if isinstance(module, Gate):
            torch.nn.init.eye_(module.weight)
            if layer.bias is not None:
                module.e_score_correction_bias.copy_(torch.tensor(layer.bias))
    return model


def expert_parallelism() -> dict[str, Any]:
    """What its recipe passes on for two ranks and ``ep_size: 2``, in float32."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))
    experts = init_device_mesh("cpu", (1, 2), mesh_dim_names=("ep_shard", "ep"))
    axes = {"dp_axis_names": ("dp",), "ep_axis_name": "ep"}
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    return {"world_mesh": mesh, "moe_mesh": experts, "mp_policy": policy, **axes}


def fully_shard(model: Any) -> Any:
    """What its recipe does on two ranks by default, ``strategy: fsdp2``, in float32."""
    try:
        from nemo_automodel.components.distributed.config import FSDP2Config
        from nemo_automodel.components.distributed.mesh import MeshContext
        from nemo_automodel.components.distributed.model_parallelizer import parallelize_model
    except ImportError:
        raise NotTried("another interface in this release") from None
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    return parallelize_model(model, MeshContext.build(FSDP2Config(mp_policy=policy)))


def checkpoint_by(way: str, model: torch.nn.Module) -> None:
    """Recomputes MoE layers by ``torch.utils.checkpoint``, as a loop of one's own does it."""
    for module in model.modules():
        if isinstance(module, MoE):
            module.forward = partial(checkpoint, module.forward, use_reentrant=way == "reentrant")


def whole(value: Any) -> Tensor:
    """All of a tensor that may be sharded."""
    tensor: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return tensor
