"""Automodel's DeepSeek-V3 in tiny, its loop on a CPU, and what must come out."""

from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from frameworks.float64 import MicroBatch, Reference
from nemo_automodel.components.models.common.utils import BackendConfig
from nemo_automodel.components.models.deepseek_v3.model import DeepseekV3ForCausalLM
from nemo_automodel.components.moe.config import MoEConfig
from nemo_automodel.components.moe.experts import GroupedExperts
from nemo_automodel.components.moe.layers import Gate
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config

import equipoise

VOCABULARY, LENGTH, EXPERTS, K = 32, 12, 8, 2
BACKEND = {"attn": "sdpa", "linear": "torch", "rms_norm": "torch", "experts": "torch", "dispatcher": "torch"}


def moe_config(**options):
    sizes = {"dim": 16, "inter_dim": 16, "moe_inter_dim": 8, "n_routed_experts": EXPERTS, "n_activated_experts": K}
    groups = {"n_shared_experts": 0, "n_expert_groups": 1, "n_limited_groups": 1}
    gate = {"score_func": "sigmoid", "route_scale": 1.0, "norm_topk_prob": True, "train_gate": True}
    own = {"gate_bias_update_factor": 1e-3, "aux_loss_coeff": 0.0, "dtype": torch.float32}
    return MoEConfig(**(sizes | groups | gate | own | options))


def make_gate(precision=torch.float32, **options):
    gate = Gate(moe_config(**options), gate_precision=precision).train()
    generator = torch.Generator().manual_seed(0)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return gate


def make_model(dtype=torch.float32, spread=20, **options):
    """``spread``: a factor on the weights of the gates, so that the scores of experts differ from the beginning."""
    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=EXPERTS,
        num_experts_per_tok=K,
        first_k_dense_replace=0,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        max_position_embeddings=32,
        dtype=dtype,
    )
    backend = BackendConfig(**BACKEND, enable_hf_state_dict_adapter=False)
    model = DeepseekV3ForCausalLM(config, moe_config(dtype=dtype, **options), backend)
    with torch.no_grad():
        model.initialize_weights(torch.device("cpu"), dtype)
        for gate in gates_of(model).values():
            gate.weight.mul_(spread)
    return model.train()


def gates_of(model):
    names = [name for name, module in model.named_modules() if isinstance(module, Gate)]
    return {plain_name(name): model.get_submodule(name) for name in names}


def plain_name(name):
    return name.replace("_checkpoint_wrapped_module.", "")


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def make_steps(lengths, rank=0):
    """By optimizer step, the micro-batches of one rank. ``lengths``: by step, by micro-batch, tokens of each row."""
    generator = torch.Generator().manual_seed(rank)
    steps = []
    for by_micro_batch in lengths:
        step = []
        for rows in by_micro_batch:
            ids = torch.randint(VOCABULARY, (len(rows), LENGTH), generator=generator)
            mask = torch.arange(LENGTH) < torch.tensor(rows)[:, None]
            step.append(MicroBatch(ids, mask, torch.arange(len(rows))[:, None].expand_as(ids)))
        steps.append(step)
    return steps


def all_reduced(number):
    """As the recipe's ``_dp_allreduce``."""
    total = torch.tensor(float(number))
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def train(model, steps, strategy, lr=0.0, after_attach=None):
    """Automodel's order of a step. By step: gradients, loads, biases; and the balance.

    ``after_attach`` is called with the balance before the first step.

    The recipe divides the summed loss by the labels of all micro-batches and ranks, and multiplies it by the number of
    ranks, because FSDP2 and DDP divide by that.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    balance = equipoise.attach(model, strategy)
    if after_attach is not None:
        after_attach(balance)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    balance.follow(optimizer)
    result = {"gradients": [], "loads": [], "biases": [], "tokens": [], "maxvio": [], "loss": []}
    for step in steps:
        labels = [torch.where(part.mask, part.ids, -100)[:, 1:] for part in step]
        num_labels = all_reduced(sum((part != -100).sum() for part in labels))
        num_tokens = all_reduced(sum(part.mask.sum() for part in step))
        losses = []
        for part, targets in zip(step, labels, strict=True):
            logits = model(part.ids, padding_mask=~part.mask).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum") / num_labels
            losses.append(loss.item())
            loss = loss + balance.num_tokens / num_tokens * balance.loss()
            (world * loss).backward()
        gradients = {plain_name(name): p.grad for name, p in model.named_parameters() if p.grad is not None}
        result["gradients"].append({name: whole(value).clone() for name, value in gradients.items()})
        optimizer.step()
        optimizer.zero_grad()
        model.update_moe_gate_bias()
        result["loads"].append({plain_name(name): load for name, load in balance.load.items()})
        result["biases"].append({plain_name(name): bias for name, bias in balance.biases.items()})
        result["tokens"].append(balance.metrics()["tokens"])
        result["maxvio"].append(balance.metrics()["maxvio_batch"])
        result["loss"].append(sum(losses))
    return result, balance


def plain_experts(experts, x, token_mask, weights, indices):
    """As ``GroupedExperts``, whose sums and gradients are float32 whatever its weights are."""
    output = torch.zeros_like(x)
    for expert in range(EXPERTS):
        for slot in range(indices.shape[1]):
            rows = torch.where((indices[:, slot] == expert) & token_mask)[0]
            gate, up = (x[rows] @ experts.gate_and_up_projs[expert]).chunk(2, dim=-1)
            inner = F.silu(gate) * up * weights[rows, slot, None]
            output = output.index_add(0, rows, inner @ experts.down_projs[expert])
    return output


class AutomodelReference(Reference):
    def __init__(self, model, **options):
        super().__init__(model, gates_of, EXPERTS, K, **options)
        for gate in self.routers.values():
            gate.gate_precision = gate.score_dtype = torch.float64
        for module in self.model.modules():
            if isinstance(module, GroupedExperts):
                module.forward = partial(plain_experts, module)

    def steer(self, router, bias):
        router.bias_update_factor, router.e_score_correction_bias = 0.0, bias

    def forward(self, part):
        self.model(part.ids, padding_mask=~part.mask)

    def weight(self, part, rank, ranks):
        """Its share of the tokens of all ranks."""
        return part.mask.sum() / sum(other.mask.sum() for rank_parts in ranks for other in rank_parts)


def expected(model, steps_by_rank, rate, coefficient=10.0, scope="micro_batch", **options):
    reference = AutomodelReference(model, **options)
    return [reference.window(list(ranks), rate, coefficient, scope) for ranks in zip(*steps_by_rank, strict=True)]
