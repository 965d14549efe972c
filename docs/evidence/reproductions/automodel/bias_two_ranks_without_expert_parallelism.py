"""Under ``strategy: fsdp2`` with ``ep_size: 1``, the default, expert biases differ between ranks.

NeMo Automodel 0.7.0, torch 2.13, CPU, 2 ranks by itself. Gate.update_bias (moe/layers.py:626) sums counts over
ranks only if the bias is a DTensor, which expert parallelism makes it. Expected: the same bias on both ranks, moved by
the counts of both. Actual: each rank moves its own by its own counts.
"""

import tempfile

import torch
from nemo_automodel.components.distributed.config import FSDP2Config
from nemo_automodel.components.distributed.mesh import MeshContext
from nemo_automodel.components.distributed.model_parallelizer import parallelize_model
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.models.deepseek_v3.model import DeepseekV3Config, DeepseekV3ForCausalLM

sizes = dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "n_routed_experts"), 8)
sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads", "n_group", "topk_group"), 1)
sizes |= dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 4)
sizes |= {"vocab_size": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 0, "dtype": torch.float32}
PLAIN = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "experts": "torch", "dispatcher": "torch"}


def run(rank, store):
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    backend = BackendConfig(**PLAIN, enable_hf_state_dict_adapter=False)
    module = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes), backend=backend)
    module.initialize_weights(torch.device("cpu"), torch.float32)
    model = parallelize_model(module, MeshContext.build(FSDP2Config())).train()
    model(torch.randint(32, (1, 16), generator=torch.Generator().manual_seed(rank))).logits.sum().backward()
    model.update_moe_gate_bias()
    bias = module.model.layers["0"].mlp.gate.e_score_correction_bias
    print(f"rank {rank}: {(bias / 1e-3).round().tolist()} thousandths; expected the same on both", flush=True)


if __name__ == "__main__":
    torch.multiprocessing.spawn(run, (tempfile.mkdtemp() + "/store",), nprocs=2)
