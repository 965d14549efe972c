"""What both of OLMo-core's MoEs have in common: how their train modules step."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, distributed

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, Recompute, StepResult


class OlmoCoreTraining(Driver):
    INTENDED_USE = {
        "labels, loss_div_factor, post_batch": "olmo_core/train/train_module/transformer/train_module.py, train_batch",
        "compute_auxiliary_metrics": "the same; each metric is reduced over ranks as it says",
        "latest_loss, step": "olmo_core/optim/skip_step_optimizer.py, SkipStepOptimizer: set before each step",
        "eval(); state_dict": "olmo_core/train/train_module/transformer/train_module.py, eval_batch; _get_state_dict",
    }
    imbalance_of = staticmethod(lambda counts: max(counts) * len(counts) / sum(counts))
    layer: Layer
    routers: list[Any]
    model: Any
    optimizer: Any
    _build: Any  # of a dtype and a way of recomputation
    _loss_div_factor: Any = staticmethod(lambda labels: labels)

    def _feed(self, dtype: torch.dtype) -> None:
        for n, router in enumerate(self.routers):
            router.register_forward_pre_hook(lambda _, args, n=n: (self.hidden[n].to(dtype), *args[1:]))
            router.weight.data.copy_(torch.eye(self.layer.experts).flatten())
            if self.layer.bias is not None:
                router.score_bias.copy_(torch.tensor(self.layer.bias))

    def train_step(
        self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
        has_finite_gradients: bool = True) -> StepResult:  # fmt: skip
        if recompute == "reentrant" or batches[0].replayed is not None:
            raise NotOffered("reentrant checkpointing" if recompute else "a replay of routing")
        if any(batch.sequence_ids is not None for batch in batches):
            raise NotOffered("a loss within packed documents: its instances are rows")
        if self.layer.loss == "global_batch" and len(batches) > 1:
            raise NotOffered("counts pooled over micro-batches: it pools those of one over ranks, as documented")
        if recompute is not None:
            self._build(self.layer.dtype, recompute)
        self.model.zero_grad(set_to_none=False)
        labels = torch.cat([_labels(batch).flatten() for batch in batches if batch.mode == "train"])
        number = self._loss_div_factor((labels != -100).sum())
        last = max(n for n, batch in enumerate(batches) if batch.mode == "train")
        for n, batch in enumerate(batches):
            with nullcontext() if n == last else getattr(self.model, "no_sync", nullcontext)():
                self._forward(batch, number)
        if hasattr(self.model, "finalize_grad_reduce"):
            self.model.finalize_grad_reduce()
        gradients = [getattr(router.weight, "_main_grad_fp32", router.weight.grad) for router in self.routers]
        if not has_finite_gradients:
            gradients[0].fill_(torch.inf)
        self.model.post_batch()
        metrics = {name: value for name, (value, _) in self.model.compute_auxiliary_metrics().items()}
        imbalance = metrics.get("global load imbalance", metrics.get("load imbalance", torch.zeros(())))
        if distributed.is_initialized() and self.layer.rank_without is None:
            distributed.all_reduce(imbalance, distributed.ReduceOp.MAX)
        for ce_loss in [1.0] if is_applied else [1.0, 1.0, 1.0, 100.0]:  # it skips the step of a spike
            self.optimizer.latest_loss, self.optimizer.latest_grad_norm = torch.tensor(ce_loss), torch.tensor(1.0)
        self.optimizer.step()
        loss = None if self.layer.loss is None else float(metrics["load balancing loss unscaled"])
        return StepResult(loss, [g.view(self.layer.experts, -1) for g in gradients], None, float(imbalance))

    def _forward(self, batch: Batch, number: Tensor | None = None) -> Any:
        self.hidden, labels = batch.logits, _labels(batch)
        self.model.train(batch.mode.startswith("train"))
        with torch.set_grad_enabled(batch.mode in ("train", "evaluate_with_gradients")):
            output = self.model(labels.clamp(min=0), labels=labels, loss_reduction="sum", loss_div_factor=number)
        if batch.mode == "train":
            (0 * output.loss).backward()
        return output

    def biases(self) -> list[Tensor]:
        return [router.score_bias for router in self.routers]

    def choose(self, batch: Batch) -> Tensor:
        chosen: list[Tensor] = []
        self.routers[0].register_forward_hook(lambda _, __, output: chosen.append(output[1]))
        self._forward(Batch(batch.logits, mode="evaluate"))
        return chosen[0].flatten(0, 1)

    def evaluation_loss(self, batch: Batch) -> float:
        output = self._forward(batch)
        return float(output.loss - output.ce_loss)

    def cast(self, dtype: torch.dtype) -> None:
        self._build(dtype)  # before it trains

    def save(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)


def _labels(batch: Batch) -> Tensor:
    """The tokens that are text and not a prompt."""
    labels = torch.zeros(batch.logits.shape[1:3], dtype=torch.int64)
    for mask in (batch.mask, batch.labels):
        labels[slice(0) if mask is None else ~mask] = -100
    return labels
