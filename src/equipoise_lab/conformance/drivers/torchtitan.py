"""torchtitan: its DeepSeek-V3 debug model, built and stepped as by its Trainer. It has a bias, and no loss."""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed
from torch.distributed.tensor import distribute_tensor
from torchtitan.components.optimizer import default_adamw
from torchtitan.config import ParallelismConfig, TrainingConfig
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC
from torchtitan.distributed.utils import clip_grad_norm_
from torchtitan.models import deepseek_v3, qwen3
from torchtitan.models.common import MoE
from torchtitan.trainer import Trainer

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, Recompute, StepResult
from equipoise_lab.conformance.drivers.torchtitan_on_cpu import built


class TorchTitan(Driver):
    PACKAGE = "torchtitan"
    INTENDED_USE = {
        "Trainer.Config, clip_grad_norm_, optimizers.step": "torchtitan/trainer.py, Trainer; train_step skips no step",
        "training.dtype": "torchtitan/config/configs.py, TrainingConfig.dtype: a model is built in it, not cast",
        "SelectiveAC": "torchtitan/trainer.py, Trainer.Config.activation_checkpoint: the default",
        "FullAC": "torchtitan/distributed/activation_checkpoint.py: torch's checkpoint_wrapper, non-reentrant",
        "eval(), train(); state_dict": "torchtitan/components/validate.py; checkpointer/base.py, ModelWrapper",
    }

    def __init__(self, layer: Layer) -> None:
        if layer.loss is not None:
            raise NotOffered("a load-balancing loss")
        if layer.capacity is not None:
            raise NotOffered("a capacity of experts")
        if layer.is_wrapped_in_ddp:
            raise NotOffered("DistributedDataParallel: it replicates by FSDP2")
        self.layer = layer
        self._build(layer.dtype)

    def _build(self, dtype: torch.dtype, recompute: Recompute | None = None) -> None:
        layer, name, is_staged = self.layer, str(dtype).removeprefix("torch."), self.layer.rank_without is not None
        spec = deepseek_v3.model_registry("debugmodel", num_mtp_layers=int(layer.has_prediction_head))
        is_dense = is_staged and layer.rank_without == distributed.get_rank()
        spec.model.layers = [spec.model.layers[0 if is_dense else 1]] * (layer.number - layer.has_prediction_head)
        for _, moe, _, _ in spec.model.traverse(MoE.Config):
            router = moe.router
            moe.load_balance_coeff = layer.bias_rate or (1e-3 if layer.bias else None)  # it refuses 0; no step follows
            router.gate.in_features = router.gate.out_features = router.num_experts = layer.experts
            router.top_k, router.score_func, router.route_norm = layer.k, layer.score_function, layer.normalises_weights
            router.num_expert_groups, router.num_limited_groups = layer.groups or (None, None)
        self.model, self.optimizers = built(Trainer.Config(
            model_spec=spec, optimizer=default_adamw(lr=0.0),
            activation_checkpoint=recompute and {"own": SelectiveAC, "non_reentrant": FullAC}[recompute].Config(),
            training=TrainingConfig(dtype=name, mixed_precision_param=name, disable_cuda_graphs=True),
            parallelism=ParallelismConfig(pipeline_parallel_degree=1 + is_staged, spmd_backend="partial_dtensor"),
        ))  # fmt: skip
        self.moes = [module for module in self.model.modules() if isinstance(module, MoE)]
        for n, moe in enumerate(self.moes):
            moe.router.register_forward_pre_hook(lambda _, args, n=n: (self.hidden[n].to(dtype), *args[1:]))
            weight = moe.router.gate.weight.data
            weight.copy_(distribute_tensor(torch.eye(layer.experts), weight.device_mesh, weight.placements))
            if layer.bias is not None:
                moe.expert_bias_E.copy_(torch.tensor(layer.bias))

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
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizers.step()
        return StepResult()

    def _forward(self, batch: Batch) -> None:
        self.hidden = batch.logits
        self.model.train(batch.mode.startswith("train"))
        with torch.set_grad_enabled(batch.mode in ("train", "evaluate_with_gradients")):
            outputs = self.model(torch.zeros(batch.logits.shape[1:3], dtype=torch.int64))
        if batch.mode == "train":
            sum(0 * output.sum() for output in outputs).backward()  # of rows, or of heads

    def biases(self) -> list[Tensor]:
        return [moe.expert_bias_E for moe in self.moes]

    def choose(self, batch: Batch) -> Tensor:
        chosen: list[Tensor] = []
        self.moes[0].router.register_forward_hook(lambda _, __, output: chosen.append(output[1]))
        self._forward(Batch(batch.logits, mode="evaluate"))
        return chosen[0].flatten(0, 1)

    def default_bias_rate(self) -> float:
        return max(m.load_balance_coeff for _, m, _, _ in qwen3.model_registry("30B-A3B").model.traverse(MoE.Config))

    cast = _build  # before it trains: a model is built in its dtype

    def save(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
