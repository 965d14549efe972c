"""VeOmni: its Qwen3 MoE in tiny, in the order of its trainer's step; its DeepSeek-V3 for expert groups."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from veomni.utils import moe_monitor
from veomni.utils.constants import IGNORE_INDEX
from veomni.utils.loss_utils import count_loss_token, mean_global_loss

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, Recompute, StepResult
from equipoise_lab.conformance.drivers import veomni_on_cpu as on_cpu


class VeOmni(Driver):
    PACKAGE = "veomni"
    INTENDED_USE = {
        "train_step": "veomni/trainer/base.py: train_step, forward_backward_step, postforward",
        "PackingCollator": "veomni/trainer/base.py: _build_collate_fn; veomni/data/data_collator.py: MainCollator",
        "MoERouterMonitor": "veomni/trainer/callbacks/trace_callback.py: MoERouterMonitorCallback",
        "build_foundation_model": "veomni/trainer/base.py: _build_model, without mixed_precision.enable",
        "pause, resume": "veomni/utils/moe_monitor.py: MoERouterMonitor",
    }
    imbalance_of = staticmethod(lambda counts: max(counts) * len(counts) / sum(counts) - 1)  # max_vio

    def __init__(self, layer: Layer) -> None:
        if layer.capacity or layer.loss in ("sequence", "global_batch"):
            raise NotOffered("a capacity of experts" if layer.capacity else "a loss of that scope")
        if layer.loss and layer.score_function == "sigmoid":
            raise NotOffered("a loss for sigmoid routers")
        if layer.is_wrapped_in_ddp or layer.rank_without is not None or layer.has_prediction_head:
            raise NotOffered("anything that moves an expert bias")
        self.layer, self.value_at_balance = layer, layer.k / layer.number  # it is a mean over layers
        self.state = on_cpu.start_ranks()
        self.model = on_cpu.model_of(layer)
        self._attach()

    def _attach(self) -> None:
        self.gates = [block.mlp.gate for block in self.model.model.layers]
        for number, gate in enumerate(self.gates):
            gate.register_forward_pre_hook(lambda gate, args, n=number: (self.hidden[n],))
        ranks = self.state.fsdp_group if self.state.fsdp_enabled else None
        self.monitor = moe_monitor.MoERouterMonitor(self.layer.experts, ranks)
        moe_monitor.set_active_monitor(self.monitor)
        moe_monitor.attach_moe_router_monitor(self.model, self.monitor)

    def train_step(self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
                   has_finite_gradients: bool = True) -> StepResult:  # fmt: skip
        if self.layer.groups or self.layer.bias:
            raise NotOffered("anything that moves an expert bias")
        if recompute is not None:
            self.model.gradient_checkpointing_enable({"use_reentrant": recompute == "reentrant"})
        data, loss = [self._collated(batch) for batch in batches], None
        tokens = count_loss_token([part for part, batch in zip(data, batches, strict=True) if batch.mode == "train"])
        for part, batch in zip(data, batches, strict=True):
            output = self._forward(part, batch)
            if batch.mode == "train":
                losses, loss = mean_global_loss(output.loss, count_loss_token(part), tokens), output.aux_loss
                torch.stack(list(losses.values())).sum().backward()
        gradients = [on_cpu.whole(gate.weight.grad) / self.value_at_balance for gate in self.gates]
        load = self.monitor.get_load_matrix()
        imbalance = float(self.monitor.compute_vio(load)["max_vio"][0])
        counts = (
            [(share * data[0]["labels"].numel() * self.layer.k).round() for share in load] if len(data) == 1 else None
        )
        return StepResult(None if loss is None else float(loss) / self.value_at_balance, gradients, counts, imbalance)

    def _collated(self, batch: Batch) -> dict[str, Any]:
        """Packed: a row without its padding is a sequence."""
        parts = []
        for number, row in enumerate(torch.ones(batch.logits.shape[1:3]).bool() if batch.mask is None else batch.mask):
            ids = torch.arange(int(row.sum())) % on_cpu.VOCABULARY
            labels = ids.clone() if batch.labels is None else ids.masked_fill(~batch.labels[number][row], IGNORE_INDEX)
            part = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
            parts += [{**part, "position_ids": torch.arange(len(ids))}] if len(ids) else []
        if not parts:
            raise NotOffered("micro-batches of padding alone: its collator packs the tokens of sequences")
        return on_cpu.PackingCollator()(parts)

    def _forward(self, data: dict[str, Any], batch: Batch) -> Any:
        is_token = slice(None) if batch.mask is None else batch.mask.flatten()
        self.hidden = batch.logits.flatten(1, 2)[:, is_token]
        if batch.replayed is not None:
            raise NotOffered("a count of replayed routing: its monitor shows what routers themselves choose")
        if batch.mode != "train":
            self.monitor.pause()
        with torch.set_grad_enabled(batch.mode in ("train", "evaluate_with_gradients")):
            output = self.model.train(batch.mode.startswith("train"))(**data, use_cache=False)
        self.monitor.resume()
        return output

    def biases(self) -> list[Tensor]:
        if self.layer.bias_rate:
            raise NotOffered("anything that moves an expert bias")
        return [gate.e_score_correction_bias for gate in self.gates]

    def choose(self, batch: Batch) -> Tensor:
        chosen: list[Tensor] = []
        experts = self.model.model.layers[0].mlp.experts
        experts.register_forward_pre_hook(lambda experts, args: chosen.append(args[1]))
        self._forward(self._collated(batch), Batch(batch.logits, batch.mask, mode="evaluate"))
        return chosen[0]

    def cast(self, dtype: torch.dtype) -> None:
        self.model = on_cpu.loaded(self.model, dtype)
        self._attach()
