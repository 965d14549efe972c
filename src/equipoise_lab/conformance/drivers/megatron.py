"""Megatron-Core: a tiny GPTModel in its schedules, whose routers get the hidden states of the scenario."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, Recompute, StepResult

from equipoise_lab.conformance.drivers.megatron_training_on_cpu import Training  # isort: skip  (before megatron)
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction

LOSSES = {"micro_batch": "aux_loss", "sequence": "seq_aux_loss", "global_batch": "global_aux_loss", None: "none"}
RECOMPUTED: dict[str, Any] = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


class Megatron(Driver):
    PACKAGE = "megatron-core"
    INTENDED_USE = {
        "options of the router; recompute_modules": "megatron/core/transformer/moe/README.md",
        "RouterReplay": "docs/api-guide/router_replay.md, Usage Guide",
        "padding_mask": "megatron/core/models/gpt/gpt_model.py, GPTModel.forward: 'Padding mask for MoE routing'",
        "packed sequences; tokens_per_sample": "pretrain_gpt.py, forward_step: it is the length of a row",
        "order of a step": "megatron/training/training.py, train_step",
        "a skipped step": "megatron/core/optimizer/optimizer_config.py, OptimizerConfig.grad_norm_skip_threshold",
        "fp16, where an infinite gradient skips a step": "megatron/core/optimizer/grad_scaler.py, DynamicGradScaler",
        "a bias comes after Float16Module": "megatron/training/training.py, setup_model_and_optimizer: load_checkpoint",
    }

    def __init__(self, layer: Layer) -> None:
        if layer.is_wrapped_in_ddp:
            raise NotOffered("a training in torch's DistributedDataParallel: it has one of its own")
        if layer.score_function == "sigmoid" and not layer.normalises_weights:
            raise NotOffered("sigmoid weights of the chosen experts that are not normalised")
        self.layer = layer
        self._build([torch.tensor(layer.bias)] * layer.number if layer.bias else [])

    def _build(self, biases: Sequence[Tensor], **options: Any) -> None:
        layer, head, empty = self.layer, self.layer.has_prediction_head, self.layer.rank_without
        groups, open_groups = layer.groups or (None, None)
        loss: dict[str, Any] = {"moe_router_load_balancing_type": LOSSES[layer.loss]}
        RouterReplay.clear_global_router_replay_instances()
        self.training = training = Training(
            layer.experts, [1] * (layer.number - head) if empty is None else [int(n != empty) for n in range(2)],
            layer.dtype, mtp_num_layers=int(head) or None, num_moe_experts=layer.experts, moe_router_topk=layer.k,
            moe_router_num_groups=groups, moe_router_group_topk=open_groups, moe_router_dtype="fp32",
            moe_router_pre_softmax=layer.k == 1 or not layer.normalises_weights, moe_token_dispatcher_type="alltoall",
            moe_aux_loss_coeff=float(layer.loss is not None), moe_router_score_function=layer.score_function,
            moe_router_enable_expert_bias=layer.bias is not None or layer.bias_rate is not None,
            moe_router_bias_update_rate=layer.bias_rate or 0.0, moe_expert_capacity_factor=layer.capacity, **options,
            moe_pad_expert_input_to_capacity=layer.pads_to_capacity, **({} if layer.sets_coefficient_only else loss),
        )  # fmt: skip
        for number, router in enumerate(training.routers):
            torch.nn.init.eye_(router.weight)
            router.register_forward_pre_hook(lambda _, inputs, number=number: (training.hidden[number], *inputs[1:]))
            if biases:
                router.load_state_dict({**router.state_dict(), "expert_bias": biases[number]})
        training.optimizer.reload_model_params()

    def train_step(self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
                   has_finite_gradients: bool = True) -> StepResult:  # fmt: skip
        replayed = batches[0].replayed
        if recompute in ("reentrant", "non_reentrant"):
            raise NotOffered("torch's checkpoint as a way of recomputation")
        self.layer = self.layer if has_finite_gradients else replace(self.layer, dtype=torch.float16)
        if recompute or replayed is not None or not (is_applied and has_finite_gradients):
            options = RECOMPUTED if recompute else {} if is_applied else {"grad_norm_skip_threshold": 1e-9}
            self._build(self.biases(), moe_enable_routing_replay=replayed is not None, **options)
        if replayed is not None:
            RouterReplay.set_replay_data([ids.transpose(0, 1).flatten(0, 1) for ids in replayed])
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
        for batch in [batch for batch in batches if batch.mode != "train"]:  # its schedule runs a whole step
            with batch.forward_of(self.training.model):
                self.training.forward_backward([batch], forward_only=True)
        weight = float(not (is_applied and has_finite_gradients))  # of the loss of the model
        loss = self.training.train_step([batch for batch in batches if batch.mode == "train"], weight)
        return StepResult(loss, self.training.gradients, self.training.counts or None)

    def biases(self) -> list[Tensor]:
        return [router.expert_bias.float().clone() for router in self.training.routers if router.enable_expert_bias]

    def choose(self, batch: Batch) -> Tensor:
        self.training.evaluate(batch)
        rows, length = batch.logits.shape[1:3]
        return self.training.routing_map.view(length, rows, -1).transpose(0, 1).nonzero()[:, 2].view(-1, self.layer.k)

    def evaluation_loss(self, batch: Batch) -> float:
        return self.training.evaluate(batch) - Megatron(replace(self.layer, loss=None)).training.evaluate(batch)

    def cast(self, dtype: torch.dtype) -> None:
        self.layer = replace(self.layer, dtype=dtype)
        self._build(self.biases())

    def save(self) -> Any:
        return self.training.save_checkpoint()

    def load(self, state: Any) -> None:
        self.training.load_checkpoint(state)
