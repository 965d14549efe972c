"""A tiny mixture-of-experts model without any code of the library, and one optimizer step of it in float64.

The reference is the model itself as ``double()``: autograd over all of it, shares and signs by plain loops. It shares
the forward with the model that is trained, and nothing with the library.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

WIDTH, EXPERTS, K, VOCAB = 8, 6, 2, 32
RATE, COEFFICIENT = 1e-2, 0.5
BOTH = f"loss-free:rate={RATE},rule=sign+lbl:coefficient={COEFFICIENT}"
Batch = dict[str, Tensor]


class Router(nn.Module):
    """``slot``: sigmoid scores and a bias of its own, as DeepSeek-V3; else softmax scores, as Qwen3-MoE."""

    def __init__(self, slot: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH) * 0.7)
        if slot:
            self.register_buffer("e_score_correction_bias", torch.zeros(EXPERTS))
        self.has_slot = slot

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = nn.functional.linear(hidden, self.weight)
        scores = logits.sigmoid() if self.has_slot else logits.softmax(-1)
        ranked = scores + self.e_score_correction_bias if self.has_slot else scores
        expert_ids = torch.topk(ranked, K, dim=-1)[1]
        weights = scores.gather(-1, expert_ids)
        return logits, weights / weights.sum(-1, keepdim=True), expert_ids


class Block(nn.Module):
    def __init__(self, slot: bool):
        super().__init__()
        self.gate = Router(slot)
        self.experts = nn.Parameter(torch.randn(EXPERTS, WIDTH) * 0.3)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        _, weights, expert_ids = self.gate(flat)
        mixed = (self.experts[expert_ids] * weights[..., None]).sum(-2)
        return x + self.out((flat * mixed).view_as(x))


class PlainNet(nn.Module):
    """A block whose router has a slot, and one whose router has none. Its output is a mean over unmasked tokens."""

    def __init__(self, seed: int = 0, recomputes: str | None = None):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(True), Block(False)])
        self.head = nn.Linear(WIDTH, VOCAB)
        self.recomputes = recomputes

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            if self.recomputes is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.recomputes == "reentrant")
        losses = nn.functional.cross_entropy(self.head(x).flatten(0, 1), input_ids.flatten(), reduction="none")
        mask = attention_mask.flatten().to(losses.dtype)
        return (losses * mask).sum() / mask.sum()


def batches(number: int, seed: int = 0, rows: int = 2) -> list[Batch]:
    """Batches whose numbers of unmasked tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        ids = torch.randint(0, VOCAB, (rows, 9), generator=generator)
        mask = torch.ones(rows, 9, dtype=torch.int64)
        mask[0, 9 - index % 5 :] = 0
        mask[1, 5 + index % 3 :] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


class Reference:
    """Optimizer steps of plain SGD in float64.

    ``biases`` and ``counts`` are those after the last step, by layer: ``blocks.0.gate``, ``blocks.1.gate``.
    """

    def __init__(self, model: PlainNet, learning_rate: float, balanced: bool = True):
        self.model = copy.deepcopy(model).double().train()
        self.model.recomputes = None
        self.learning_rate, self.balanced = learning_rate, balanced
        self.biases = {f"blocks.{index}.gate": [0.0] * EXPERTS for index in range(2)}
        self.counts = {name: [0] * EXPERTS for name in self.biases}

    def step(
        self, window: Sequence[Sequence[Batch]], factor: float, applied: bool = True, reaches: float = 1.0
    ) -> dict[str, Tensor]:
        """One step over ``window[m]``, the batches that all ranks have at once. Returns its gradient.

        Each batch has the loss ``factor * (mean over its tokens + COEFFICIENT * sum over layers of E sum_e f_e P_e)``.
        f is counted over the batches of all ranks up to m. ``reaches`` scales the gradient of the step.
        """
        self.counts = {name: [0] * EXPERTS for name in self.biases}
        self.model.zero_grad()
        for simultaneous in window:
            routed = [self._forward(batch) for batch in simultaneous]
            for _, layers, mask in routed:
                for name, (_, expert_ids) in layers.items():
                    for token, chosen in enumerate(expert_ids.tolist()):
                        for expert in chosen if mask[token] else ():
                            self.counts[name][expert] += 1
            for loss, layers, mask in routed:
                for name, (scores, _) in layers.items() if self.balanced else ():
                    shares = [count / sum(self.counts[name]) for count in self.counts[name]]
                    mean = (scores / scores.sum(-1, keepdim=True))[mask].mean(0)
                    loss = loss + COEFFICIENT * EXPERTS * sum(share * p for share, p in zip(shares, mean, strict=True))
                (factor * loss).backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        if applied:
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter -= self.learning_rate * reaches * parameter.grad
            for name, counts in self.counts.items() if self.balanced else ():
                mean = sum(counts) / EXPERTS
                signs = [(mean > count) - (mean < count) for count in counts]
                for expert in range(EXPERTS):
                    self.biases[name][expert] += RATE * (signs[expert] - sum(signs) / EXPERTS)
        return gradients

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor]:
        layers: dict[str, tuple[Tensor, Tensor]] = {}
        hooks = []
        for name, bias in self.biases.items():
            router = self.model.get_submodule(name)
            if router.has_slot:
                router.e_score_correction_bias = torch.tensor(bias, dtype=torch.float64)

            def route(module, args, output, name=name, bias=bias):
                logits, _, expert_ids = output
                scores = logits.sigmoid() if module.has_slot else logits.softmax(-1)
                if not module.has_slot:  # without a slot the bias is ours to add
                    expert_ids = torch.topk(scores + torch.tensor(bias, dtype=torch.float64), K, dim=-1)[1]
                weights = scores.gather(-1, expert_ids)
                layers[name] = scores, expert_ids
                return logits, weights / weights.sum(-1, keepdim=True), expert_ids

            hooks.append(router.register_forward_hook(route))
        loss = self.model(**batch)
        for hook in hooks:
            hook.remove()
        return loss, layers, batch["attention_mask"].flatten().bool()


def assert_biases(ours: dict[str, Tensor], expected: dict[str, list[float]]) -> None:
    """Equal up to the rounding of float32."""
    assert ours.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(ours[name].double(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-8)


def assert_counts(ours: dict[str, Tensor], expected: dict[str, list[int]]) -> None:
    assert {name: counts.tolist() for name, counts in ours.items()} == expected


def assert_gradient(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Within 1e-6 by norm: all parameters together, and each router by itself."""
    assert ours.keys() == expected.keys()
    routers = [[name] for name in expected if name.endswith("gate.weight")]
    for names in (list(expected), *routers):
        square = sum(float((ours[name].double() - expected[name]).square().sum()) for name in names)
        assert square**0.5 <= 1e-6 * sum(float(expected[name].square().sum()) for name in names) ** 0.5, names
