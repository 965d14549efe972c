"""Small models for tests: a two-block language model around real routers of Transformers, and tiny whole families."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise import RouterKind

DIM, EXPERTS, K, VOCAB = 8, 6, 2, 32
BIASED, SOFTMAX = RouterKind("sigmoid", "e_score_correction_bias"), RouterKind("softmax", None)
FAMILIES = {  # the five that most tests run on
    "deepseek_v3": BIASED,
    "glm4_moe": BIASED,
    "mixtral": SOFTMAX,
    "olmoe": SOFTMAX,
    "qwen3_moe": SOFTMAX,
}


def _router(kind: str) -> nn.Module:
    from transformers import Glm4MoeConfig, Qwen3MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

    if kind == "sigmoid":
        config = Glm4MoeConfig(
            hidden_size=DIM, n_routed_experts=EXPERTS, num_experts_per_tok=K, n_group=1, topk_group=1
        )
        router = Glm4MoeTopkRouter(config)
    else:
        config = Qwen3MoeConfig(hidden_size=DIM, num_experts=EXPERTS, num_experts_per_tok=K, norm_topk_prob=True)
        router = Qwen3MoeTopKRouter(config)
    nn.init.normal_(router.weight, std=0.7)
    return router


class Block(nn.Module):
    """A router, and experts that scale the hidden state. Small, but with every gradient path of a real layer."""

    def __init__(self, kind: str):
        super().__init__()
        self.gate = _router(kind)
        self.experts = nn.Parameter(torch.randn(EXPERTS, DIM) * 0.3)
        self.out = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, DIM)
        _, weights, expert_ids = self.gate(flat)
        mixed = (self.experts[expert_ids] * weights.to(x.dtype)[..., None]).sum(-2)
        return x + self.out((flat * mixed).view_as(x))


class TinyLM(nn.Module):
    """An embedding, a sigmoid block with a slot (GLM-4.5), a softmax block without one (Qwen3), a loss over unmasked
    tokens."""

    def __init__(self, checkpointing: str | None = None):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, DIM)
        self.blocks = nn.ModuleList([Block("sigmoid"), Block("softmax")])
        self.checkpointing = checkpointing

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            if self.checkpointing is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
        error = x.float().square().mean(-1)
        if attention_mask is None:
            return error.mean()
        return (error * attention_mask).sum() / attention_mask.sum().clamp_min(1)


def tiny_lm(checkpointing: str | None = None, seed: int = 0) -> TinyLM:
    torch.manual_seed(seed)
    return TinyLM(checkpointing).train()


def family(name: str, *, layers: int = 2, experts: int = 8, k: int = 2, seed: int = 0, **options: Any) -> nn.Module:
    """A tiny Transformers model of a family. Its routers prefer some experts to others."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config: dict[str, Any] = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts_per_tok=k,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    if name in ("glm4_moe", "deepseek_v3"):
        config |= dict(n_routed_experts=experts, n_shared_experts=1, first_k_dense_replace=0, n_group=1, topk_group=1)
    if name == "glm4_moe":
        config |= dict(head_dim=16)
    if name == "deepseek_v3":
        config |= dict(q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)
    if name == "qwen3_moe":
        config |= dict(num_experts=experts, head_dim=16, norm_topk_prob=True)
    if name in ("olmoe", "mixtral"):
        del config["moe_intermediate_size"]
        config |= {"intermediate_size": 16, "num_experts" if name == "olmoe" else "num_local_experts": experts}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **(config | options)))
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("gate.weight"):
            nn.init.normal_(parameter, std=0.3)
    return model.train()
