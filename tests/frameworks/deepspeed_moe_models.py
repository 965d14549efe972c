"""A tiny model of DeepSpeed's own MoE layers, and one optimizer step of it in float64 by plain loops.

The reference shares the weights with the model that is trained, and neither its forward nor the library.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from plain_model import EXPERTS, VOCAB, WIDTH, Batch
from plain_model import Reference as PlainReference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LAYERS = 2
GATES = [f"blocks.{index}.deepspeed_moe.gate" for index in range(LAYERS)]


class Kind(NamedTuple):
    """Options of ``deepspeed.moe.layer.MoE``."""

    k: int
    drops: bool
    ep_size: int = 1
    use_rts: bool = False

    def options(self) -> dict[str, Any]:
        capacity = dict(capacity_factor=0.8, eval_capacity_factor=0.8, min_capacity=1)
        chance = dict(use_rts=self.use_rts, top2_2nd_expert_sampling=False)
        return dict(num_experts=EXPERTS, ep_size=self.ep_size, k=self.k, drop_tokens=self.drops, **capacity, **chance)


class MoENet(nn.Module):
    """Two MoE layers with residuals. Its output is a mean over unmasked tokens.

    ``rank``: in the expert parallel group, which says which experts it holds.
    """

    def __init__(self, kind: Kind, seed: int = 0, rank: int = 0, recomputes: str | None = None):
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.kind, self.recomputes = kind, recomputes
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(MoE(WIDTH, nn.Linear(WIDTH, WIDTH), **kind.options()) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCAB)
        num_local = EXPERTS // kind.ep_size
        with torch.no_grad():
            for plain in (self.embed.weight, self.head.weight, self.head.bias):
                plain.copy_(torch.randn(plain.shape, generator=generator) * 0.6)
            for block in self.blocks:
                block.deepspeed_moe.gate.wg.weight.copy_(torch.randn(EXPERTS, WIDTH, generator=generator) * 0.7)
                experts = torch.randn(EXPERTS, WIDTH, WIDTH + 1, generator=generator) * 0.3
                local_experts = block.deepspeed_moe.experts.deepspeed_experts
                for number, expert in enumerate(local_experts):
                    expert.weight.copy_(experts[rank * num_local + number, :, :-1])
                    expert.bias.copy_(experts[rank * num_local + number, :, -1])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = x + self._run(block, x)
        losses = nn.functional.cross_entropy(self.head(x).flatten(0, 1), input_ids.flatten(), reduction="none")
        mask = attention_mask.flatten().to(losses.dtype)
        return (losses * mask).sum() / mask.sum()

    def _run(self, block: nn.Module, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            output: Tensor = block(x)[0]  # without l_aux
            return output

        if self.recomputes is None:
            return run(x)
        if self.recomputes == "deepspeed":
            import deepspeed

            deepspeed.checkpointing.configure(
                None, partition_activations=False, checkpoint_in_cpu=False, num_checkpoints=LAYERS
            )
            recomputed: Tensor = deepspeed.checkpointing.checkpoint(run, x)
            return recomputed
        return checkpoint(run, x, use_reentrant=self.recomputes == "reentrant")


def batches(number: int, seed: int = 0, lengths: Sequence[int] = (9, 9)) -> list[Batch]:
    """Batches whose numbers of unmasked tokens differ, of rows with these lengths in turn.

    No two tokens of a batch are the same: among equal scores DeepSpeed drops any.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(number):
        length = lengths[index % len(lengths)]
        ids = torch.randperm(VOCAB, generator=generator)[: 2 * length].view(2, length)
        mask = torch.ones(2, length, dtype=torch.int64)
        mask[0, length - index % 5 :] = 0
        mask[1, 4 + index % 3 :] = 0
        made.append({"input_ids": ids, "attention_mask": mask})
    return made


def whole_names(net: MoENet, gradients: dict[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Gradients by the names that the parameters have in a model with all experts."""
    first = rank * EXPERTS // net.kind.ep_size if net.kind.ep_size > 1 else 0
    renamed = {}
    for name, value in gradients.items():
        head, is_expert, tail = name.partition("deepspeed_experts.")
        if is_expert:
            number, _, rest = tail.partition(".")
            name = f"{head}{is_expert}{int(number) + first}.{rest}"
        renamed[name] = value
    return renamed


class Reference(PlainReference):
    """Optimizer steps of plain SGD in float64. Experts, capacity and weights by plain loops."""

    model: Any

    def __init__(self, net: MoENet, learning_rate: float, balanced: bool = True):
        super().__init__(net, learning_rate, balanced)  # a copy in float64, of which only the weights are used
        self.kind = net.kind
        self.biases = {name: [0.0] * EXPERTS for name in GATES}
        self.counts = {name: [0] * EXPERTS for name in GATES}

    def step(self, window: Sequence[Sequence[Batch]], *arguments: Any, **options: Any) -> dict[str, Tensor]:
        for parameter in self.model.parameters():  # an expert without tokens has a gradient of 0
            parameter.grad = torch.zeros_like(parameter)
        zero_grad = self.model.zero_grad
        self.model.zero_grad = lambda: [p.grad.zero_() for p in self.model.parameters()]
        try:
            return super().step(window, *arguments, **options)
        finally:
            self.model.zero_grad = zero_grad

    def _forward(self, batch: Batch) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]], Tensor]:
        ids, mask = batch["input_ids"].flatten(), batch["attention_mask"].flatten().bool()
        layers = {}
        x = self.model.embed.weight[ids]
        for name, block in zip(GATES, self.model.blocks, strict=True):
            x, scores, chosen = self._block(x, block.deepspeed_moe, self.biases[name])
            layers[name] = scores, torch.tensor(chosen)
        logits = x @ self.model.head.weight.T + self.model.head.bias
        losses = logits.logsumexp(-1) - logits.gather(-1, ids[:, None]).squeeze(-1)
        return losses[mask].mean(), layers, mask

    def _block(self, x: Tensor, moe: Any, bias: list[float]) -> tuple[Tensor, Tensor, list[list[int]]]:
        scores = (x @ moe.gate.wg.weight.T).softmax(-1)
        ranked = (scores.detach() + torch.tensor(bias, dtype=torch.float64)).tolist()
        chosen = [sorted(range(EXPERTS), key=lambda e, row=row: -row[e])[: self.kind.k] for row in ranked]
        within_capacity = self._within_capacity(chosen, scores.tolist())
        outputs = []
        for token, experts in enumerate(chosen):
            weights = [scores[token, expert] for expert in experts if (token, expert) in within_capacity]
            total = 1 if self.kind.k == 1 else sum(weights)
            y = x[token]
            for weight, expert in zip(weights, [e for e in experts if (token, e) in within_capacity], strict=True):
                layer = moe.experts.deepspeed_experts[expert]
                y = y + weight / total * (layer.weight @ x[token] + layer.bias)
            outputs.append(y)
        return torch.stack(outputs), scores, chosen

    def _within_capacity(self, chosen: list[list[int]], scores: list[list[float]]) -> set[tuple[int, int]]:
        """(token, expert) that have a place: with k = 2 the first choices, then in order; above, the largest scores."""
        pairs = {(token, expert) for token, experts in enumerate(chosen) for expert in experts}
        if not self.kind.drops:
            return pairs
        k, within_capacity = self.kind.k, set()
        assert k > 1  # with k = 1 DeepSpeed drops by chance, or any of those that are equal
        capacity = max(math.ceil(len(chosen) / EXPERTS * 0.8 * k), 1)
        for expert in range(EXPERTS):
            if k == 2:
                places = [token for place in range(2) for token, row in enumerate(chosen) if row[place] == expert]
            else:
                places = [token for token, row in enumerate(chosen) if expert in row]
                places.sort(key=lambda token, expert=expert: -scores[token][expert])
            within_capacity |= {(token, expert) for token in places[:capacity]}
        return within_capacity


def assert_gradient(ours: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Within 1e-6 by norm: all parameters that this rank has together, and each gate by itself."""
    for names in (list(ours), *([name] for name in expected if name.endswith("wg.weight"))):
        square = sum(float((ours[name].double() - expected[name]).square().sum()) for name in names)
        size = sum(float(expected[name].square().sum()) for name in names)
        assert square**0.5 <= tolerance * size**0.5, (names, (square / size) ** 0.5)
