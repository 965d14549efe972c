"""What a step of the Trainer must count and differentiate: plain loops, and autograd over the whole model in float64.

Shares no code with equipoise. It knows of torchtitan's model only what its routers return.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Given(NamedTuple):
    """A micro-batch of one rank."""

    inputs: dict[str, Tensor]
    labels: Tensor


class Step(NamedTuple):
    """What a step must give, by layer or by parameter."""

    load: dict[str, Tensor]
    gradients: dict[str, Tensor]
    tokens: int


def counts_by_hand(labels: Tensor, positions: Tensor, shift: int = 0) -> list[list[bool]]:
    """Which tokens count: the token or a later one of its document has a label. ``shift``: of an MTP layer."""
    counted = []
    for row_labels, row_positions in zip(labels.tolist(), positions.tolist(), strict=True):
        length, begins = len(row_labels), [0]
        for t in range(1, length):
            if row_positions[t] != row_positions[t - 1] + 1:
                begins.append(t)
        row = [False] * length
        for begin, end in zip(begins, [*begins[1:], length], strict=True):
            has_label = False
            for t in reversed(range(begin, end)):
                has_label = has_label or (t + shift < end and row_labels[t + shift] != -100)
                row[t] = has_label
        counted.append(row)
    return counted


def documents_by_hand(positions: Tensor) -> list[list[tuple[int, int]]]:
    """The document of each token, as (row, number)."""
    names = []
    for n, row in enumerate(positions.tolist()):
        number, names_of_row = 0, []
        for t, position in enumerate(row):
            number += t > 0 and position != row[t - 1] + 1
            names_of_row.append((n, number))
        names.append(names_of_row)
    return names


class Reference:
    """A model in float64, with the routers' biases moved by the sign rule."""

    def __init__(self, model: nn.Module, coefficient: float, scope: str, rate: float, with_loss: bool = False):
        self.model = copy.deepcopy(model).double().train()
        self.coefficient, self.scope, self.rate, self.with_loss = coefficient, scope, rate, with_loss
        self.routers = {
            name.removesuffix(".router"): module.router
            for name, module in self.model.named_modules()
            if hasattr(module, "router")
            for name in [f"{name}.router"]
        }
        self.moe = {name: self.model.get_submodule(name) for name in self.routers}

    def step(self, by_index: list[list[Given]], ahead: Callable[[str], int] = lambda layer: 0) -> Step:
        """One optimizer step. ``by_index``: by number of the micro-batch, those of all ranks.

        The backward of a micro-batch knows the counts up to it, and of ``ahead(layer)`` more.
        """
        routed = [[self._route(given) for given in ranks] for ranks in by_index]
        num_tokens = [[sum(map(sum, m["counted"])) for m in ranks] for ranks in routed]
        total = sum(map(sum, num_tokens))
        labels = sum(int((given.labels != -100).sum()) for ranks in by_index for given in ranks)
        loss: Any = torch.zeros((), dtype=torch.float64)
        whole = self._loads([m for ranks in routed for m in ranks])
        so_far = [self._loads([m for ranks in routed[: index + 1] for m in ranks]) for index in range(len(routed))]
        for index, (ranks, tokens) in enumerate(zip(routed, num_tokens, strict=True)):
            known = {name: so_far[min(index + ahead(name), len(routed) - 1)][name] for name in whole}
            for micro_batch, n in zip(ranks, tokens, strict=True):
                loss = loss + self.coefficient * n / max(total, 1) * self._balancing_loss(micro_batch, known)
                if self.with_loss:
                    loss = loss + micro_batch["loss"] / labels
        names, parameters = zip(*self.model.named_parameters(), strict=True)
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        if self.rate:
            self._move(whole)
        zero = {name: torch.zeros_like(p) for name, p in zip(names, parameters, strict=True)}
        found = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        return Step({name: torch.tensor(load) for name, load in whole.items()}, {**zero, **found}, total)

    def _route(self, given: Given) -> dict[str, Any]:
        outputs: dict[str, Any] = {}
        hooks = [
            router.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
            for name, router in self.routers.items()
        ]
        positions = given.inputs["positions"]
        prediction = self.model(given.inputs["input"], positions=positions)
        for hook in hooks:
            hook.remove()
        loss = 0
        if self.with_loss:
            loss = nn.functional.cross_entropy(
                prediction.flatten(0, 1), given.labels.flatten(), reduction="sum", ignore_index=-100
            )
        masks = {}
        for name in outputs:
            shift = int(name.split(".")[1]) + 1 if name.startswith("mtp_layers.") else 0
            masks[name] = counts_by_hand(given.labels, positions, shift)
        return {
            "outputs": outputs,
            "masks": masks,
            "counted": counts_by_hand(given.labels, positions),
            "documents": documents_by_hand(positions),
            "loss": loss,
        }

    def _loads(self, micro_batches: list[dict[str, Any]]) -> dict[str, list[int]]:
        loads = {}
        for name, router in self.routers.items():
            load = [0] * router.num_experts
            for m in micro_batches:
                for ids, mask in zip(m["outputs"][name][1].tolist(), m["masks"][name], strict=True):
                    for of_token, counts in zip(ids, mask, strict=True):
                        for expert in of_token if counts else ():
                            load[expert] += 1
            loads[name] = load
        return loads

    def _balancing_loss(self, micro_batch: dict[str, Any], known: dict[str, list[int]]) -> Tensor:
        total: Any = 0
        for name, (_, expert_ids, scores) in micro_batch["outputs"].items():
            mask = torch.tensor(micro_batch["masks"][name])
            share = scores / scores.sum(-1, keepdim=True)
            num_experts = scores.shape[-1]
            if self.scope == "global_batch":
                load = torch.tensor(known[name], dtype=torch.float64)
                if mask.any():
                    total = total + num_experts * (load / load.sum() * share[mask].mean(0)).sum()
                continue
            documents = micro_batch["documents"]
            for document in sorted({d for row in documents for d in row}):
                inside = torch.tensor([[d == document for d in row] for row in documents]) & mask
                if inside.any():
                    load = torch.bincount(expert_ids[inside].flatten(), minlength=num_experts).double()
                    loss = num_experts * (load / load.sum() * share[inside].mean(0)).sum()
                    total = total + inside.sum() / mask.sum() * loss
        return total

    def _move(self, load: dict[str, list[int]]) -> None:
        for name, counts in load.items():
            mean = sum(counts) / len(counts)
            signs = [(mean > c) - (mean < c) for c in counts]
            step = torch.tensor([self.rate * (s - sum(signs) / len(signs)) for s in signs], dtype=torch.float64)
            self.moe[name].expert_bias_E += step

    def biases(self) -> dict[str, Tensor]:
        return {name: moe.expert_bias_E.clone() for name, moe in self.moe.items()}
