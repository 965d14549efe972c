"""Trainings of a small DeepSeek-V3 whose MoE layers AutoEP has replaced, in an engine on two ranks."""

from collections.abc import Iterator
from typing import Any

import torch
from frameworks.deepspeed_ranks import RANKS, _error, config, environment, gradients, last_violation
from frameworks.float64 import MicroBatch
from torch import Tensor, nn

import equipoise

EXPERTS, LAYERS, RATE = 8, 2, 0.05
LENGTHS = (9, 7)  # of the rows of each rank
BIAS = f"loss-free:rate={RATE},rule=sign,center=false"
LOSS = "lbl:scope=global_batch,coefficient=10"  # so large that little is lost in the difference of two trainings
CASES = [(1, 2), (2, 2), (3, 2), (0, 1)]  # stage of ZeRO, expert parallel size


def make_model(seed: int = 0) -> nn.Module:
    import transformers

    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=LAYERS, intermediate_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8)
    dims = dict(qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8)
    experts = dict(n_routed_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=16, first_k_dense_replace=0)
    groups = dict(n_group=1, topk_group=1)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.DeepseekV3Config(**sizes, **heads, **dims, **experts, **groups)
    )
    model.set_experts_implementation("eager")  # grouped products have no float64
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] += 0.05  # what all tokens share makes loads uneven
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                nn.init.normal_(parameter, std=0.3)
    return model.train()


def micro_batches(number: int, seed: int = 0) -> list[MicroBatch]:
    """With uneven padding at the end of rows, and rows of another length on each rank."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        length = LENGTHS[index % RANKS]
        mask = torch.arange(length) < torch.tensor([length - index % 3, 4 + index % 2])[:, None]
        ids = torch.randint(64, (2, length), generator=generator)
        made.append(MicroBatch(ids, mask.long(), torch.arange(2)[:, None].expand(2, length)))
    return made


def start(
    strategy: str, stage: int, ep_size: int, accumulated: int, rate: float, seed: int = 0, attach_first: bool = False
) -> Any:
    import deepspeed

    from equipoise.integrations.deepspeed import follow_engine

    settings = config(stage, accumulated, gradient_clipping=0.0)
    settings["optimizer"] = {"type": "SGD", "params": {"lr": rate}}
    parallel = dict(enabled=True, autoep_size=ep_size, preset_model="deepseek_v3", use_grouped_mm=False)
    settings["expert_parallel"] = parallel
    model = make_model(seed)
    balance = equipoise.attach(model, strategy) if attach_first else None
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)
    if balance is None:
        balance = equipoise.attach(engine, strategy)
    follow_engine(balance, engine)
    return engine, balance


def train(engine: Any, balance: Any, data: list[MicroBatch]) -> Iterator[dict[str, Any]]:
    """What each optimizer step leaves behind; of the gradients those of the routers."""
    for part in data:
        labels = part.ids.masked_fill(part.mask == 0, -100)
        loss = engine(input_ids=part.ids, attention_mask=part.mask, labels=labels).loss + balance.loss()
        engine.backward(loss)
        is_boundary = engine.is_gradient_accumulation_boundary()
        gradient = _of_routers(engine.module) if is_boundary else {}
        engine.step()
        if is_boundary:
            yield {"gradient": gradient, "biases": balance.biases, "load": balance.load}


def _of_routers(model: nn.Module) -> dict[str, Tensor]:
    routers = {name: module for name, module in model.named_modules() if name.endswith("mlp.router.gate")}
    assert len(routers) == LAYERS
    return {name: gradients(module)["weight"] for name, module in routers.items()}


def run_case(rank: int, stage: int, ep_size: int) -> dict[str, list[dict[str, Any]]]:
    """Three windows of two micro-batches, with the balancing loss and without."""
    steps = {}
    for strategy in (f"{BIAS}+{LOSS}", BIAS):
        engine, balance = start(strategy, stage, ep_size, 2, 0.0)
        steps[strategy] = list(train(engine, balance, micro_batches(12)[rank::RANKS]))
        balance.detach()
    return steps


def resumed(rank: int, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    data, strategy = micro_batches(12)[rank::RANKS], f"{BIAS}+{LOSS}"
    engine, balance = start(strategy, 1, 2, 2, 0.1)
    list(train(engine, balance, data[:4]))
    engine.save_checkpoint(folder, tag="autoep", client_state={"balance": balance.state_dict()})
    (whole,) = train(engine, balance, data[4:])
    balance.detach()
    engine, balance = start(strategy, 1, 2, 2, 0.1, seed=3)
    _, client_state = engine.load_checkpoint(folder, tag="autoep")
    balance.load_state_dict(client_state["balance"])
    (after,) = train(engine, balance, data[4:])
    balance.detach()
    return whole, after


def evened(rank: int, strategy: str) -> float:
    engine, balance = start(strategy, 2, 2, 1, 0.05)
    violation = last_violation(train(engine, balance, micro_batches(20)[rank::RANKS] * 5), 5)
    balance.detach()
    return violation


def everything(rank: int, folder: str) -> dict[Any, Any]:
    environment(rank)
    results: dict[Any, Any] = {case: run_case(rank, *case) for case in CASES}
    results["resumed"] = resumed(rank, folder)
    for strategy in ("none", "loss-free:rate=0.02,rule=sign"):
        results["evened", strategy == "none"] = evened(rank, strategy)
    results["attached first"] = _error(lambda: start(BIAS, 1, 2, 1, 0.0, attach_first=True))
    return results
