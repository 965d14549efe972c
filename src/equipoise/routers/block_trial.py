"""A trial of a block that routes by itself: its experts are replaced by some with known outputs."""

from typing import Any

import torch
from torch import Tensor, nn

from equipoise.routers.blocks import MOVE, BlockAdapter
from equipoise.routers.logits import KeepingLogits
from equipoise.routers.outputs import Refused
from equipoise.routers.stand_in import RandomTensors, make_stand_in
from equipoise.routers.steering import BiasedTopK, ChoicesSeen
from equipoise.routers.trial import Returned, Trial

_LARGE = 64  # times the size of the gate


class _KnownExpert(nn.Module):
    """An expert that gives the same output for every token."""

    def __init__(self, output: Tensor):
        super().__init__()
        self.outputs = [output]  # in a list: it is not a tensor of the block that could steer it

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return self.outputs[0].to(x.dtype).expand(*x.shape[:-1], -1)


class _Identity(nn.Module):
    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        return x


class BlockTrial(Trial):
    """A trial of a block. In its stand-in the experts have known outputs, so its output shows their weights."""

    adapter: BlockAdapter
    runs = 2

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._check_values_are_used()

    def _check_values_are_used(self) -> None:
        """Raises ``Refused`` if the output does not depend on the values of the top-k: a loss goes through them."""
        hidden = self.inputs[0]
        output, _, _ = self._run(hidden, 1.0)
        generator = torch.Generator().manual_seed(3)

        def disturb(values: Tensor, expert_ids: Tensor) -> Tensor:
            return values + torch.rand(values.shape, generator=generator, device="cpu")

        with BiasedTopK(None, by_max=self.chooses_by_max, num_experts=self.num_experts, on_choice=disturb):
            disturbed, _, _ = self._run(hidden, 1.0)
        if torch.equal(output, disturbed):
            if self.k == 1:
                raise Refused("its one weight per token is constant, so no gradient reaches its gate", MOVE, 3)
            raise Refused("the weights of its experts are not the values of its top-k", MOVE, progress=3)

    def stand_in(self, router: nn.Module, random: RandomTensors) -> nn.Module:
        gate, experts = router._modules[self.adapter.gate], router._modules[self.adapter.experts]
        assert gate is not None and isinstance(experts, nn.ModuleList)
        large = {name for name, child in router._modules.items() if child is not None and _is_large(child, gate)}
        stand_in = make_stand_in(router, random, without=large | {self.adapter.experts})
        for name in large:
            stand_in._modules[name] = _Identity()
        self.outputs = random.normal(len(experts), self.adapter.width(router) or 0)
        self._put_experts(stand_in, 1.0)
        return stand_in

    def _put_experts(self, stand_in: nn.Module, factor: float) -> None:
        experts = nn.ModuleList(_KnownExpert(factor * output) for output in self.outputs)
        stand_in._modules[self.adapter.experts] = experts

    def _forward(self, hidden: Tensor) -> Returned:
        (output, logits, expert_ids), (output_2, logits_2, expert_ids_2) = (
            self._run(hidden, 1.0),
            self._run(hidden, 2.0),
        )
        if not (torch.equal(logits, logits_2) and torch.equal(expert_ids, expert_ids_2)):
            remedy = "Leave the noise out of its choice, or call eval() before attach and train() after"
            raise Refused("it gives another result each time that it runs", remedy, progress=3)
        # What the experts add. A residual and shared experts do not depend on the factor.
        added = (output_2 - output).reshape(-1, output.shape[-1]).double()
        if added.shape != (len(expert_ids), self.outputs.shape[1]):
            raise Refused(f"its forward gives {tuple(output.shape)} for tokens {tuple(hidden.shape)}", MOVE)
        of_chosen = self.outputs[expert_ids].transpose(-1, -2).double()  # [tokens, dim, k]
        weights = torch.linalg.lstsq(of_chosen, added.unsqueeze(-1)).solution
        error = (of_chosen @ weights).squeeze(-1) - added
        if (weights.abs() < 1e-9).any() or error.abs().max() > 1e-3 * added.abs().max():
            reason = "its output is not the sum over the experts of its top-k: tokens above a capacity may be dropped"
            raise Refused(reason, "Switch the capacity off", progress=3)
        return Returned((weights.squeeze(-1).float(), expert_ids), logits)

    def _run(self, hidden: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor]:
        """Output, logits and the ids of the experts that its one top-k chose."""
        self._put_experts(self.router, factor)
        seen = ChoicesSeen(len(self.outputs))
        kept_logits = KeepingLogits(self.router, self.adapter)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), kept_logits, seen:
            output: Any = self.router.forward(hidden.clone(), **self.arguments)
        output = output[0] if isinstance(output, tuple | list) and output else output
        if not isinstance(output, Tensor) or not isinstance(kept_logits.value, Tensor):
            raise Refused("its forward does not return hidden states, or does not call its gate", MOVE)
        choices = seen.top_k or seen.maxima
        if len(choices) != 1:
            raise Refused(
                f"it takes {len(choices)} top-k over its {len(self.outputs)} experts, and must take one", MOVE
            )
        logits = kept_logits.value.reshape(-1, kept_logits.value.shape[-1])
        return output, logits, choices[0].reshape(-1, choices[0].shape[-1])


def _is_large(child: nn.Module, gate: nn.Module) -> bool:
    """Whether a part of the block is too large to choose: it would be costly to try, as shared experts are."""
    sizes = [sum(parameter.numel() for parameter in module.parameters()) for module in (child, gate)]
    return sizes[0] > _LARGE * sizes[1]
