"""torchtitan 0.2: its DeepSeek-V3 debug model, built and stepped as by its Trainer. It has a bias, and no loss."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor, distributed
from torchtitan.components.optimizer import build_optimizers_with_moe_load_balancing
from torchtitan.config import JobConfig
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.models import deepseek_v3, qwen3
from torchtitan.models.moe import MoE

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, Recompute, StepResult
from equipoise_lab.conformance.drivers import torchtitan_0_2_on_cpu as on_cpu


class TorchTitan(Driver):
    PACKAGE = "torchtitan"
    INTENDED_USE = {
        "get_train_spec, parallelize_fn, build_optimizers_fn": "torchtitan/train.py, Trainer.__init__",
        "training.dtype": "torchtitan/config/job_config.py, Training.dtype: a model is built in it, not cast",
        "activation_checkpoint": "the same: selective by operations; full, which is torch's, non-reentrant",
    }

    def __init__(self, layer: Layer) -> None:
        if layer.loss is not None:
            raise NotOffered("a load-balancing loss")
        if layer.capacity is not None:
            raise NotOffered("a capacity of experts")
        if layer.has_prediction_head:
            raise NotOffered("a multi-token-prediction head")
        self.layer = layer
        self._build(layer.dtype)

    def _build(self, dtype: torch.dtype, recompute: Recompute | None = None) -> None:
        layer, config, spec = self.layer, JobConfig(), deepseek_v3.get_train_spec()
        config.training.dtype = config.training.mixed_precision_param = str(dtype).removeprefix("torch.")
        config.activation_checkpoint.mode = {None: "none", "own": "selective"}.get(recompute, "full")
        config.activation_checkpoint.selective_ac_option = "op"
        config.optimizer.lr, config.optimizer.implementation = 0.0, "for-loop"  # a fused step needs a GPU
        on_cpu.join_group()
        copies, stages = 1 + layer.is_wrapped_in_ddp, 1 + (layer.rank_without is not None)  # of two ranks
        config.parallelism.data_parallel_replicate_degree, config.parallelism.pipeline_parallel_degree = copies, stages
        args = deepcopy(spec.model_args["debugmodel"])
        args.update_from_config(config)
        args.n_layers, args.dim, args.moe_inter_dim = layer.number, layer.experts, layer.experts
        args.n_dense_layers = layer.number if distributed.get_rank() == layer.rank_without else 0
        moe = args.moe_args
        moe.num_experts, moe.top_k, moe.score_func = layer.experts, layer.k, layer.score_function
        moe.load_balance_coeff = layer.bias_rate or (1e-3 if layer.bias else None)  # it refuses 0; no step follows
        moe.route_norm = layer.normalises_weights
        moe.num_expert_groups, moe.num_limited_groups = layer.groups or (None, None)
        self.model, self.optimizers = on_cpu.built(spec, args, config)
        self.moes = [module for module in self.model.modules() if isinstance(module, MoE)]
        for n, block in enumerate(self.moes):
            block.router.register_forward_pre_hook(lambda _, args, n=n: (self.hidden[n].to(dtype), *args[1:]))
            on_cpu.copy_into(block.router.gate.weight.data, torch.eye(layer.experts))
            if layer.bias is not None:
                block.expert_bias.copy_(torch.tensor(layer.bias))

    cast = _build  # before it trains: a model is built in its dtype

    def train_step(
        self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
        has_finite_gradients: bool = True) -> StepResult:  # fmt: skip
        if recompute == "reentrant":
            raise NotOffered("reentrant checkpointing")
        if not (is_applied and has_finite_gradients):
            raise NotOffered("optimizer steps that are skipped, by the loop or for infinite gradients")
        if batches[0].replayed is not None:
            raise NotOffered("a replay of routing")
        if recompute is not None:
            self._build(self.layer.dtype, recompute)
        for batch in batches:
            self._forward(batch)
        clip_grad_norm_(list(self.model.parameters()), 1.0)
        self.optimizers.step()
        return StepResult()

    def _forward(self, batch: Batch) -> None:
        self.hidden = batch.logits.flatten(1, 2)
        self.model.train(batch.mode.startswith("train"))
        with torch.set_grad_enabled(batch.mode in ("train", "evaluate_with_gradients")):
            output = self.model(torch.zeros(batch.logits.shape[1:3], dtype=torch.int64))
        if batch.mode == "train":
            (0 * output.sum()).backward()

    def biases(self) -> list[Tensor]:
        return [moe.expert_bias for moe in self.moes]

    def choose(self, batch: Batch) -> Tensor:
        chosen: list[Tensor] = []
        self.moes[0].router.register_forward_hook(lambda _, __, output: chosen.append(output[1]))
        self._forward(Batch(batch.logits, mode="evaluate"))
        return chosen[0]

    def default_bias_rate(self) -> float:
        is_updated = qwen3.get_train_spec().build_optimizers_fn is build_optimizers_with_moe_load_balancing
        return qwen3.qwen3_args["30B-A3B"].moe_args.load_balance_coeff if is_updated else 0.0

    def save(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
