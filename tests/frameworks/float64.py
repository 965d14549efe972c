"""What must come out of a training of a framework's model: in float64, by autograd and plain loops.

The weights of the trained model must not move (rate of learning 0); the biases do, by the sign rule, not centred.
"""

import copy
from typing import NamedTuple

import torch

__all__ = ["MicroBatch", "Reference", "Window", "errors"]


class Window(NamedTuple):
    """What must come out of one optimizer step."""

    loads: dict  # by layer
    biases: dict  # after the step
    gradient: dict  # of the balancing loss, by parameter


class MicroBatch(NamedTuple):
    ids: torch.Tensor
    mask: torch.Tensor
    sequences: torch.Tensor  # a number for each token


class Reference:
    """A copy of the model in float64, steered by biases of its own. A subclass says how its routers are steered."""

    def __init__(self, model, routers_of, experts=8, k=2, function="softmax"):
        self.experts, self.k, self.function = experts, k, function
        self.model = copy.deepcopy(model).double().train()
        self.routers = routers_of(self.model)
        self.inputs = {}
        self.biases = {name: torch.zeros(experts, dtype=torch.float64) for name in self.routers}
        for name, router in self.routers.items():
            self.steer(router, self.biases[name])
            router.register_forward_pre_hook(lambda module, args, name=name: self.inputs.update({name: args[0]}))

    def steer(self, router, bias):
        """Makes the copy choose by this bias too."""
        raise NotImplementedError

    def forward(self, part):
        self.model(part.ids)

    def weight(self, part, rank, ranks):
        """Of the balancing loss of a micro-batch in the gradient."""
        raise NotImplementedError

    def route(self, part):
        """By layer: normalised scores [tokens, experts], and the experts of each token."""
        to_float = torch.Tensor.float
        torch.Tensor.float = torch.Tensor.double  # frameworks cast to float32 in routers, norms and RoPE
        try:
            self.forward(part)
        finally:
            torch.Tensor.float = to_float
        routed = {}
        for name, router in self.routers.items():
            logits = self.inputs[name].reshape(part.ids.numel(), -1) @ router.weight.view(self.experts, -1).T
            scores = logits.softmax(-1) if self.function == "softmax" else logits.sigmoid()
            ranked = (scores.detach() + self.biases[name]).tolist()
            chosen = [sorted(range(self.experts), key=lambda e, row=row: -row[e])[: self.k] for row in ranked]
            routed[name] = scores / scores.sum(-1, keepdim=True), chosen
        return routed

    def window(self, ranks, rate, coefficient=0.0, scope="micro_batch"):
        """``ranks``: of each rank its micro-batches."""
        self.model.zero_grad()
        loads = {name: [0] * self.experts for name in self.routers}
        for number in range(len(ranks[0])):
            routed = [self.route(rank[number]) for rank in ranks]
            for rank, by_layer in zip(ranks, routed, strict=True):
                for name, (_, chosen) in by_layer.items():
                    for is_token, experts in zip(rank[number].mask.flatten().tolist(), chosen, strict=True):
                        for expert in experts:
                            loads[name][expert] += is_token
            for rank, by_layer in zip(ranks, routed, strict=True):
                weight = self.weight(rank[number], rank, ranks)
                for name, (scores, chosen) in by_layer.items():
                    if coefficient and weight:
                        loss = self.loss(scores, chosen, rank[number], scope, loads[name])
                        (coefficient * weight * loss).backward(retain_graph=True)
        for name, load in loads.items():
            mean = sum(load) / self.experts
            steps = [rate * ((mean > count) - (mean < count)) for count in load]
            self.biases[name] = self.biases[name] + torch.tensor(steps, dtype=torch.float64)
            self.steer(self.routers[name], self.biases[name])
        gradient = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return Window({name: torch.tensor(load) for name, load in loads.items()}, dict(self.biases), gradient)

    def loss(self, scores, chosen, part, scope, load):
        """E sum_e f_e P_e; f over the micro-batch, each sequence, or the loads of all ranks so far."""
        mask, sequences = part.mask.flatten().tolist(), part.sequences.flatten().tolist()
        tokens = [token for token, is_token in enumerate(mask) if is_token]
        groups = {}
        for token in tokens:
            groups.setdefault(sequences[token] if scope == "sequence" else 0, []).append(token)
        total = 0
        for group in groups.values():
            counts = [0] * self.experts
            for token in group:
                for expert in chosen[token]:
                    counts[expert] += 1
            counts = load if scope == "global_batch" else counts
            share = torch.tensor(counts, dtype=torch.float64) / sum(counts)
            total = total + len(group) / len(tokens) * self.experts * (share * scores[group].mean(0)).sum()
        return total


def errors(with_loss, without, windows, is_router):
    """By step, the distance of the gradient of the balancing loss: at the routers, and over all parameters.

    Args:
        with_loss: by step, the gradient by parameter of a training with the balancing loss.
        without: of the same training without it.
        windows: by step, what must come out.
        is_router: whether a parameter, by its name, is one of a router.
    """
    at_routers, everywhere = [], []
    for ours, plain, window in zip(with_loss, without, windows, strict=True):
        for names, distances in (
            ([name for name in window.gradient if is_router(name)], at_routers),
            (list(window.gradient), everywhere),
        ):
            gaps = (ours[name].double() - plain[name].double() - window.gradient[name] for name in names)
            gap = sum(float(value.square().sum()) for value in gaps)
            size = sum(float(window.gradient[name].square().sum()) for name in names)
            distances.append((gap / size) ** 0.5)
    return at_routers, everywhere
