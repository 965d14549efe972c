"""NeMo Automodel: its Qwen3 MoE and DeepSeek models in tiny, in the order of its recipe's optimizer step."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from nemo_automodel.components.checkpoint.stateful_wrappers import ModelState
from nemo_automodel.components.distributed.ddp import DDPConfig, DDPManager
from nemo_automodel.components.models.common.utils import cast_model_to_dtype
from nemo_automodel.components.moe import load_balance_metrics as metrics
from nemo_automodel.components.moe import parallelizer
from nemo_automodel.components.moe.layers import Gate
from nemo_automodel.components.moe.megatron.moe_utils import MoEAuxLossAutoScaler
from nemo_automodel.components.moe.router_replay import RouterReplay
from torch import Tensor

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, Recompute, StepResult
from equipoise_lab.conformance.drivers import automodel_on_cpu as on_cpu


class Automodel(Driver):
    PACKAGE = "nemo-automodel"
    INTENDED_USE = {
        "order of a step, scale of the loss, update_moe_gate_bias": "recipes/llm/train_ft.py: _run_train_optim_step",
        "parallelize_model, apply_ac": "docs/guides/llm/finetune.mdx#expert-parallelism-for-moe-models",
        "DDPManager": "docs/guides/distributed-setup.mdx: strategy",
        "collect_expert_loads, compute_brief_metrics": "recipes/llm/train_ft.py: _log_moe_metrics",
        "cast_model_to_dtype": "components/models/deepseek_v3/model.py: initialize_weights",
        "RouterReplay": "components/moe/router_replay.py: Usage",
    }
    imbalance_of = staticmethod(lambda counts: max(counts) * len(counts) / sum(counts))

    def __init__(self, layer: Layer) -> None:
        if layer.loss not in (None, "micro_batch") or layer.capacity is not None:
            raise NotOffered("a capacity of experts" if layer.capacity else "a loss of that scope")
        options = {"aux_loss_coeff": 1.0 if layer.loss else 0.0, "gate_bias_update_factor": layer.bias_rate or 0.0,
                   "force_e_score_correction_bias": bool(layer.bias or layer.groups), "enable_routing_replay": True,
                   "score_func": layer.score_function}  # fmt: skip
        options |= dict(zip(("n_expert_groups", "n_limited_groups"), layer.groups or (1, 1), strict=True))
        RouterReplay.clear_registry()
        self.model: Any = on_cpu.model_of(layer, options)
        self.gates: Any = [module for module in self.model.modules() if isinstance(module, Gate)]
        for number, gate in enumerate(self.gates):
            gate.register_forward_pre_hook(lambda gate, args, n=number: (self.hidden[n].flatten(0, 1), *args[1:]))
        self.cast(layer.dtype)
        metrics.enable_load_balance_tracking(self.model)
        self.group = dist.group.WORLD if dist.is_initialized() and layer.rank_without is None else None
        if layer.is_wrapped_in_ddp:
            self.model = DDPManager(DDPConfig()).parallelize(self.model)
        elif layer.holds_all_experts:
            self.model = on_cpu.fully_shard(self.model)
        elif self.group is not None:
            parallelizer.parallelize_model(self.model, **on_cpu.expert_parallelism())

    def train_step(self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
                   has_finite_gradients: bool = True) -> StepResult:  # fmt: skip
        if not (is_applied and has_finite_gradients):
            raise NotOffered("optimizer steps that are skipped, by the loop or for infinite gradients")
        if recompute == "own":
            parallelizer.apply_ac(self.model)
        elif recompute is not None:
            on_cpu.checkpoint_by(recompute, self.model)
        MoEAuxLossAutoScaler.main_loss_backward_scale = torch.tensor(1 / sum(b.mode == "train" for b in batches))
        for batch in batches:
            with nullcontext() if batch.replayed is None else RouterReplay.replay(list(batch.replayed.flatten(1, 2))):
                self._forward(batch)
        if hasattr(self.model, "update_moe_gate_bias"):  # as the recipe asks
            self.model.update_moe_gate_bias()
        gradients = [on_cpu.whole(gate.weight.grad) for gate in self.gates]
        loads = metrics.collect_expert_loads(self.model, self.group)
        shown = metrics.compute_brief_metrics(loads)
        counts = None  # those that are shown are of the last forward
        if len(batches) == 1:
            counts = [load["expert_load"] for load in loads.values()]
        loss = shown.get("moe/aux_loss_mean")
        return StepResult(loss and loss * len(loads), gradients, counts, shown.get("moe/expert_utilization_max"))

    def _forward(self, batch: Batch) -> None:
        self.hidden = batch.logits.to(next(self.model.parameters()).dtype)
        ids, padding = torch.zeros(batch.logits.shape[1:3]).long(), None if batch.mask is None else ~batch.mask
        with torch.set_grad_enabled(batch.mode in ("train", "evaluate_with_gradients")):
            output = self.model.train(batch.mode.startswith("train"))(ids, padding_mask=padding).logits
        if batch.mode == "train":
            (0 * output.sum()).backward()

    def biases(self) -> list[Tensor]:
        return [on_cpu.whole(gate.e_score_correction_bias).float() for gate in self.gates]

    def choose(self, batch: Batch) -> Tensor:
        with RouterReplay.record():
            self._forward(Batch(batch.logits, batch.mask, mode="evaluate"))
        return RouterReplay.collect()[0]

    def evaluation_loss(self, batch: Batch) -> float:
        self._forward(batch)  # the recipe reports the cross-entropy alone, and gates make a loss in training
        return metrics.compute_brief_metrics(metrics.collect_expert_loads(self.model)).get("moe/aux_loss_mean", 0.0)

    def default_bias_rate(self) -> float:
        return float(on_cpu.model_of(Layer(), {}).model.moe_config.gate_bias_update_factor)

    def cast(self, dtype: torch.dtype) -> None:
        cast_model_to_dtype(self.model, dtype)

    def save(self) -> Any:
        return {name: value.clone() for name, value in ModelState(self.model).state_dict().items()}

    def load(self, state: Any) -> None:
        ModelState(self.model).load_state_dict(state)
