"""seq_aux_loss takes a row of packed sequences for one sequence.

Megatron-Core 0.19.2, TransformerLayer._maybe_unflatten_for_moe restores rows by tokens_per_sample, to which
pretrain_gpt.py gives the length of a row. cu_seqlens are not read. Expected: f and P of each of the 4 sequences.
Actual: those of the 2 rows: a gradient of strength 0.71, 0.37 of its size away. Issue #6108. Runs on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.transformer import TransformerConfig, build_module  # noqa: E402
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp  # noqa: E402

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
options = {"moe_router_load_balancing_type": "seq_aux_loss", "moe_aux_loss_coeff": 1.0, "use_cpu_initialization": True}
config = TransformerConfig(**sizes, **options, add_bias_linear=False)
spec = get_gpt_layer_local_spec(num_experts=8, moe_grouped_gemm=False)
spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
spec.submodules.self_attention, spec.submodules.self_attn_bda = IdentityOp, IdentityFuncOp
layer = build_module(spec, config=config, layer_number=1)
gate = layer.mlp.router.weight
weight = torch.nn.init.eye_(gate).detach().clone().requires_grad_()

rows = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(11)) + torch.linspace(0.8, -0.8, 8)
ends = torch.tensor([0, 4, 8, 12, 16], dtype=torch.int32)
packed = PackedSeqParams("thd", ends, ends, tokens_per_sample=8)
output, _ = layer(rows.view(16, 1, 8), packed_seq_params=packed)
(0.0 * output.sum()).backward()
scores = (rows @ weight.t()).softmax(-1).view(4, 4, 8)  # [sequences, length, experts]
counts = torch.nn.functional.one_hot(scores.topk(2).indices, 8).sum((1, 2))
(8 * (counts / 8 * scores.mean(1)).sum(-1)).mean().backward()
strength = (gate.grad * weight.grad).sum() / weight.grad.square().sum()
distance = (gate.grad - weight.grad).norm() / weight.grad.norm()
print(f"expected strength 1, distance 0; actual {strength:.4f}, {distance:.4f}")
