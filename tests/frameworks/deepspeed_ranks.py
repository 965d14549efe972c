"""Small trainings under DeepSpeed on two ranks, and what one process gives in float64."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from plain_model import BOTH, Batch, PlainNet, batches
from torch import Tensor, nn

import equipoise

LR, RANKS = 0.1, 2


def environment(rank: int) -> None:
    """DeepSpeed on a CPU. The process group exists already."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29519"}


def config(stage: int, accumulated: int = 1, **options: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": accumulated,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        **options,
    }


def two_groups(net: nn.Module) -> list[dict[str, Any]]:
    """As with weight decay for some of the parameters: the optimizer inside makes a step for each group."""
    parameters = list(net.parameters())
    return [{"params": parameters[:3]}, {"params": parameters[3:]}]


def start(net: nn.Module, strategy: str, settings: dict[str, Any], attach_first: bool = True) -> tuple[Any, Any, Any]:
    """The engine, the balance, and what follows the engine."""
    import deepspeed

    from equipoise.integrations.deepspeed import follow_engine

    balance = equipoise.attach(net, strategy) if attach_first else None
    optimizer = torch.optim.SGD(two_groups(net), lr=LR)
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=settings)
    if balance is None:
        balance = equipoise.attach(engine, strategy)
    return engine, balance, follow_engine(balance, engine)


def weights(net: nn.Module) -> dict[str, Tensor]:
    """The whole weights, also under ZeRO-3."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(net.parameters())):
        return {name: parameter.detach().clone() for name, parameter in net.named_parameters()}


def gradients(net: nn.Module) -> dict[str, Tensor]:
    """The whole gradients of an engine's step, before it is applied."""
    from deepspeed.utils import safe_get_full_grad

    found = {name: safe_get_full_grad(parameter) for name, parameter in net.named_parameters()}
    return {name: value.clone() for name, value in found.items() if value is not None}


def train(engine: Any, balance: Any, data: list[Batch]) -> Iterator[dict[str, Any]]:
    """What each optimizer step leaves behind."""
    for batch in data:
        loss = engine(**batch) + balance.loss()
        engine.backward(loss)
        is_boundary = engine.is_gradient_accumulation_boundary()
        gradient = gradients(engine.module) if is_boundary else {}
        engine.step()
        if is_boundary:
            yield {"gradient": gradient, "biases": balance.biases, "load": balance.load}


def run_case(rank: int, stage: int, accumulated: int, attach_first: bool, recomputes: str | None) -> Any:
    net = PlainNet(recomputes=recomputes)
    engine, balance, following = start(net, BOTH, config(stage, accumulated), attach_first)
    steps = list(train(engine, balance, batches(16)[rank::RANKS]))
    following.remove()
    assert not {"step", "backward"} & vars(engine).keys()
    balance.detach()
    return steps


CASES: list[tuple[int, int, bool, str | None]] = [  # stage, accumulated, attach_first, recomputes
    (0, 2, True, None),
    (1, 2, True, None),
    (2, 2, True, None),
    (3, 2, True, None),
    (1, 1, False, None),
    (3, 2, False, None),
    (2, 2, True, "reentrant"),
    (3, 2, True, "not reentrant"),
    (3, 2, False, "reentrant"),
    (2, 2, True, "deepspeed"),
]


def recompute_by_deepspeed() -> None:
    import deepspeed
    import plain_model

    deepspeed.checkpointing.configure(None, partition_activations=False, checkpoint_in_cpu=False, num_checkpoints=2)

    def checkpoint(block: nn.Module, x: Tensor, use_reentrant: bool) -> Tensor:
        return deepspeed.checkpointing.checkpoint(block, x)

    plain_model.checkpoint = checkpoint


# ---- skipped steps ----

PRECISIONS: dict[str, tuple[int, dict[str, Any]]] = {
    "fp16, ZeRO 0": (0, {"fp16": {"enabled": True, "initial_scale_power": 4}}),
    "fp16, ZeRO 1": (1, {"fp16": {"enabled": True, "initial_scale_power": 4}}),
    "fp16, ZeRO 3": (3, {"fp16": {"enabled": True, "initial_scale_power": 4}}),
    "bf16, ZeRO 1": (1, {"bf16": {"enabled": True}}),
    "bf16, ZeRO 3": (3, {"bf16": {"enabled": True}}),
    "autocast, ZeRO 0": (0, {"torch_autocast": {"enabled": True, "dtype": "float16"}}),
}


def is_supported(name: str) -> bool:
    """DeepSpeed trains in fp16 only on a CPU that has its instructions."""
    from deepspeed.accelerator import get_accelerator

    return "fp16" not in PRECISIONS[name][1] or bool(get_accelerator().is_fp16_supported())


def overflow(rank: int, name: str) -> list[tuple[int, bool, float]]:
    """Three windows, of which the first overflows on rank 1: closed windows, whether biases moved, tokens."""
    stage, options = PRECISIONS[name]
    engine, balance, following = start(PlainNet(), BOTH, config(stage, 2, **options))
    seen = []
    for index, batch in enumerate(batches(12)[rank::RANKS]):
        loss = engine(**batch) + balance.loss()
        engine.backward(loss * float("inf") if index < 2 and rank == 1 else loss)
        engine.step()
        if index % 2:
            moved = all(bool(bias.any()) for bias in balance.biases.values())
            seen.append((balance.num_windows, moved, balance.metrics()["tokens"]))
    assert all(bias.dtype == torch.float32 for bias in balance.biases.values())
    balance.detach()
    return seen


# ---- checkpoints ----


def resumed(rank: int, stage: int, folder: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], int]:
    """The third window at once, and after a checkpoint into other weights."""
    data = batches(12)[rank::RANKS]
    engine, balance, _ = start(PlainNet(), BOTH, config(stage, 2))
    list(train(engine, balance, data[:4]))
    engine.save_checkpoint(folder, tag=f"stage{stage}", client_state={"balance": balance.state_dict()})
    whole = list(train(engine, balance, data[4:]))
    balance.detach()
    engine, balance, _ = start(PlainNet(seed=3), BOTH, config(stage, 2))
    _, client_state = engine.load_checkpoint(folder, tag=f"stage{stage}")
    balance.load_state_dict(client_state["balance"])
    after = list(train(engine, balance, data[4:]))
    balance.detach()
    return whole, after, balance.num_windows


# ---- misuse ----


def _error(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(rank: int) -> dict[str, str]:
    from equipoise.integrations.deepspeed import follow_engine

    engine, balance, following = start(PlainNet(), BOTH, config(1, 2))
    errors = {
        "follow the optimizer": _error(lambda: balance.follow(engine.optimizer)),
        "follow the engine": _error(lambda: balance.follow(engine)),
        "twice": _error(lambda: follow_engine(balance, engine)),
        "no engine": _error(lambda: follow_engine(balance, engine.module)),
    }
    for batch in batches(4)[rank::RANKS]:
        engine.scale(engine(**batch) + balance.loss()).backward()
    errors["torch's backward"] = _error(engine.step)
    following.remove()
    engine.zenflow = True
    errors["zenflow"] = _error(lambda: follow_engine(balance, engine))
    balance.detach()
    return errors


# ---- ZeRO-3 from the beginning ----


def born_partitioned(rank: int) -> tuple[list[str], float, list[dict[str, Any]]]:
    import deepspeed

    settings = config(3, 2) | {"train_batch_size": 8}
    with deepspeed.zero.Init(config_dict_or_path=settings):
        net = PlainNet()
    engine, balance, _ = start(net, BOTH, settings, attach_first=False)
    steps = list(train(engine, balance, batches(8)[rank::RANKS]))
    names = [layer.name for layer in balance.layers]
    balance.detach()
    return names, float(weights(net)["blocks.0.gate.weight"].abs().sum()), steps


class SlotParameter(nn.Module):
    """A bias that is a parameter, as in some families."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))
        self.e_score_correction_bias = nn.Parameter(torch.zeros(6), requires_grad=False)

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden, self.weight)
        scores = logits.sigmoid()
        expert_ids = torch.topk(scores + self.e_score_correction_bias, 2, dim=-1)[1]
        return logits, scores.gather(-1, expert_ids), expert_ids


def partitioned_slot(rank: int) -> str:
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=config(3) | {"train_batch_size": 4}):
        net = nn.Sequential(SlotParameter())
    return _error(lambda: equipoise.attach(net, "loss-free"))


# ---- a training ----


def last_violation(steps: Iterable[dict[str, Any]], number: int) -> float:
    """MaxVio of this many last steps of fifty."""
    loads = [step["load"] for step in steps]
    assert len(loads) == 50
    last = {name: torch.stack([load[name] for load in loads[-number:]]).sum(0) for name in loads[0]}
    return float(equipoise.metrics.max_violation(last))


def evened(rank: int, strategy: str) -> float:
    engine, balance, _ = start(PlainNet(), strategy, config(2, 1))
    violation = last_violation(train(engine, balance, batches(20, rows=16)[rank::RANKS] * 5), 5)
    balance.detach()
    return violation


def everything(rank: int, folder: str) -> dict[Any, Any]:
    environment(rank)
    results: dict[Any, Any] = {}
    for case in CASES:
        if case[-1] == "deepspeed":
            recompute_by_deepspeed()
        results[case] = run_case(rank, *case)
    for stage in range(4):
        results["resumed", stage] = resumed(rank, stage, folder)
    results["refusals"] = refusals(rank)
    results["born partitioned"] = born_partitioned(rank)
    results["partitioned slot"] = partitioned_slot(rank)
    for strategy in ("none", BOTH.replace("rate=0.01", "rate=0.02")):
        results["evened", strategy == "none"] = evened(rank, strategy)
    for name in PRECISIONS:  # last: once there was an autocast, DeepSpeed scales the loss of later engines too
        results[name] = overflow(rank, name) if is_supported(name) else None
    return results


# ---- under the Trainer ----

TRAINER_STAGES = (None, 1, 3)


def _trained(stage: int | None, folder: str, stop: Any = (), resume: Any = None, **options: Any) -> Any:
    import deepspeed
    from accelerate.state import AcceleratorState
    from models import family
    from trainer_ranks import BOTH as STRATEGIES
    from trainer_ranks import Watch, rows
    from trainer_ranks import train as train_by_trainer

    from equipoise.integrations import EquipoiseCallback

    AcceleratorState._reset_state(True)
    if stage is not None:
        zero = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
        sizes = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), "auto")
        options["deepspeed"] = zero | sizes
    model, callback = family("glm4_moe"), EquipoiseCallback(*STRATEGIES)
    watch = Watch(callback)
    train_by_trainer(model, rows(24), [callback, watch, *stop], folder, resume=resume, **options)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        final = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback.detach()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    return watch.biases, watch.load, final


def under_the_trainer(rank: int, folder: str) -> dict[Any, Any]:
    environment(rank)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    from trainer_ranks import Stop

    results: dict[Any, Any] = {stage: _trained(stage, f"{folder}/{stage}") for stage in TRAINER_STAGES}
    saving = dict(save_strategy="steps", save_steps=1)
    for stage in TRAINER_STAGES[-1:]:
        _trained(stage, f"{folder}/stopped{stage}", stop=[Stop(1)], **saving)
        results["resumed", stage] = _trained(stage, f"{folder}/stopped{stage}", resume=True, **saving)
    return results


# ---- the page ----


def page(rank: int, codes: list[str], folder: str) -> tuple[int, float]:
    """Runs the blocks of the how-to page. Returns the number of windows, and the tokens of the last one."""
    environment(rank)
    os.environ["WORLD_SIZE"] = "1"
    import deepspeed
    import transformers

    deepspeed.init_distributed("gloo")
    sizes = dict(vocab_size=64, hidden_size=32, head_dim=16, num_hidden_layers=2, moe_intermediate_size=16)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, num_experts=8, num_experts_per_tok=2)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**sizes, **heads)).train()
    ids = torch.randint(64, (4, 2, 12), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = dict(model=model, folder=folder, config=config(1, 2))
    names |= dict(data=[{"input_ids": row, "labels": row} for row in ids])
    names["optimizer"] = torch.optim.AdamW(model.parameters())
    names |= dict(expert=nn.Linear(64, 64), hidden=torch.randn(2, 12, 64))
    for code in codes:
        exec(code, names)
    balance = names["balance"]
    return balance.num_windows, balance.metrics()["tokens"]
