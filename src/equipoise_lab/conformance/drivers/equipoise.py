"""equipoise: ``attach`` on routers of ``equipoise.nn``."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import equipoise
from equipoise.metrics import max_violation
from equipoise_lab.conformance.driver import Batch, Driver, Layer, Recompute, StepResult


class Equipoise(Driver):
    PACKAGE = "equipoise"
    INTENDED_USE = {
        "attach, loss(), step(), weights of uneven micro-batches": "docs/how-to/training_loop.md",
        "token_mask; replay; allow_empty": "docs/how-to/padding.md; docs/how-to/replay.md; docs/how-to/pipeline.md",
    }
    imbalance_of = staticmethod(lambda counts: max(counts) * len(counts) / sum(counts) - 1)

    def __init__(self, layer: Layer) -> None:
        self.layer, self.routers, (groups, open_groups) = layer, [], layer.groups or (1, 1)
        self.is_dense = layer.rank_without is not None and dist.get_rank() == layer.rank_without
        for _ in range(0 if self.is_dense else layer.number):  # a capacity is a matter of the experts, behind a router
            router = equipoise.nn.Router(
                layer.experts, layer.experts, layer.k, score_function=layer.score_function, num_groups=groups,
                top_groups=open_groups, renormalise=layer.normalises_weights and layer.k > 1,
            )  # fmt: skip
            nn.init.eye_(router.weight)
            router.e_score_correction_bias += torch.tensor(layer.bias or 0.0)
            self.routers.append(router)
        self.model = nn.ModuleList(self.routers).to(layer.dtype)
        strategy = [f"lbl:coefficient=1,scope={layer.loss}"] if layer.loss else []
        strategy += [f"loss-free:rate={layer.bias_rate}" if layer.bias_rate else "frozen"]
        self.group = None if layer.rank_without is None else dist.new_subgroups(group_size=1)[0]
        self.balance = equipoise.attach(self.model, *strategy, group=self.group, allow_empty=self.is_dense)
        wrap = nn.parallel.DistributedDataParallel if layer.is_wrapped_in_ddp else nn.Identity()
        self.called = [wrap(router) for router in self.routers]

    def train_step(
        self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
        has_finite_gradients: bool = True,
    ) -> StepResult:  # fmt: skip
        if self.is_dense:
            self.balance.step()
            return StepResult()
        self.model.zero_grad()
        tokens = sum(batch.num_tokens for batch in batches if batch.mode == "train")
        mean_tokens, value = self.sum_over_ranks(tokens, self.group) / self.sum_over_ranks(1, self.group), None
        for batch in batches:
            with batch.forward_of(self.model):
                weights = self._forward(batch, recompute if batch.mode == "train" else None)
            if batch.mode == "train":
                value = self.balance.loss()
                (0 * torch.cat(weights).sum() + batch.num_tokens / max(mean_tokens, 1) * value).backward()
        gradients = self.mean_over_ranks([router.weight.grad for router in self.routers], self.group)
        self.balance.step(applied=is_applied and has_finite_gradients)
        load = list(self.balance.load.values())
        return StepResult(
            None if value is None else float(value.detach()),
            gradients,
            load,
            float(max_violation(load[0])) if load[0].any() else None,
        )

    def _forward(self, batch: Batch, recompute: Recompute | None) -> list[Tensor]:
        layers = list(zip(self.called, batch.logits.to(self.layer.dtype), strict=True))
        if batch.mask is not None or batch.sequence_ids is not None:
            self.balance.token_mask(batch.mask, batch.sequence_ids)
        if batch.replayed is not None:
            with self.balance.replay([ids.flatten(0, 1) for ids in batch.replayed], batch.mask, moves_bias=True):
                return [router(hidden)[1] for router, hidden in layers]
        if recompute is None:
            return [router(hidden)[1] for router, hidden in layers]
        return [checkpoint(r, h.requires_grad_(), use_reentrant=recompute == "reentrant")[1] for r, h in layers]

    def biases(self) -> list[Tensor]:
        return list(self.balance.biases.values())

    def choose(self, batch: Batch) -> Tensor:
        return self.routers[0].eval()(batch.logits[0])[2]

    def evaluation_loss(self, batch: Batch) -> float:
        with batch.forward_of(self.model):
            self._forward(batch, None)
        return float(self.balance.loss().detach())

    def default_bias_rate(self) -> float:
        return self.balance.rate

    def save(self) -> Any:
        return self.model.state_dict(), self.balance.state_dict()

    def load(self, state: Any) -> None:
        self.model.load_state_dict(state[0])
        self.balance.load_state_dict(state[1])
