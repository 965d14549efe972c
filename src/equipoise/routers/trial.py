"""A trial of a router: its stand-in is run with several biases on the same random tokens."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.routers.adapter import FORMS, RouterAdapter
from equipoise.routers.kind import RouterKind
from equipoise.routers.logits import KeepingLogits
from equipoise.routers.outputs import (
    CONTRACT,
    TOKENS,
    Refused,
    check_output,
    forward_arguments,
    is_dense,
    num_tokens_of,
    output_names,
)
from equipoise.routers.stand_in import RandomTensors, make_stand_in, matrix_widths, stand_in_tensor
from equipoise.routers.steering import BiasedTopK, ChoicesSeen

ADAPTER = "See equipoise.RouterAdapter for what its methods must return"
# Where routers keep k, and their number of groups.
K_ATTRIBUTES = ("top_k", "topk")
GROUP_ATTRIBUTES = ("num_group", "num_groups", "n_group", "n_groups", "num_expert_group", "num_expert_groups")


class ExpertTensor(NamedTuple):
    """A tensor of a stand-in with a number for each expert."""

    place: dict[str, Any]  # what holds it
    name: str  # there
    neutral: Tensor  # its value where it changes neither choice nor weights
    random: tuple[Tensor, Tensor]
    may_be_slot: bool

    def put(self, value: Tensor) -> None:
        is_parameter = isinstance(self.place[self.name], nn.Parameter)
        self.place[self.name] = nn.Parameter(value, requires_grad=False) if is_parameter else value


class Returned(NamedTuple):
    """What a forward of the stand-in returned, and its logits if an adapter takes them from inside it."""

    output: Any
    logits: Tensor | None = None


class Trial:
    """A stand-in that is run with several biases on the same random tokens."""

    runs = 1  # of the router's forward, in one of the trial

    def __init__(
        self,
        router: nn.Module,
        parent: nn.Module | None,
        random: RandomTensors,
        adapter: RouterAdapter | None = None,
        top_k: int | None = None,
    ):
        random.next = 0
        self.adapter = adapter
        self.router = self.stand_in(router, random)
        if adapter is not None:
            adapter.prepare(self.router)
        if top_k is not None:
            self.router.__dict__ |= {name: top_k for name in K_ATTRIBUTES if name in self.router.__dict__}
        passed = _tensors_passed(router, parent)
        self.arguments = {name: stand_in_tensor(name, value, random) for name, value in passed.items()}
        if adapter is not None:
            self.arguments = {**adapter.arguments(TOKENS), **self.arguments}
        if needed := [name for name in forward_arguments(router, required=True)[1:] if name not in self.arguments]:
            raise Refused(f"its forward needs {' and '.join(needed)} beside the tokens", CONTRACT)
        width = None if adapter is None else adapter.width(router)
        widths = matrix_widths(self.router) if width is None else [width]
        if not widths:
            raise Refused("it has no matrix of weights", CONTRACT)
        self.inputs, returned = self._fitting_inputs(widths, random)
        output = returned.output
        if adapter is None:
            if not self.inputs and num_tokens_of(output) is not None:
                raise Refused(f"its forward gives {num_tokens_of(output)} rows for {TOKENS} tokens", CONTRACT)
            check_output(output, router)
            adapter = FORMS["dense" if is_dense(output) else "logits"]
        logits, _, expert_ids = adapter.read(output, returned.logits, None)
        self.read_by = adapter
        self.num_experts, self.k = int(logits.shape[-1]), int(expert_ids.shape[-1])
        self.has_groups = any((getattr(self.router, name, 1) or 1) > 1 for name in GROUP_ATTRIBUTES)
        self.by_expert = dict(self._tensors_by_expert())
        self._plain: dict[Any, Any] = {}

    def stand_in(self, router: nn.Module, random: RandomTensors) -> nn.Module:
        return make_stand_in(router, random)

    def _fitting_inputs(self, widths: list[int], random: RandomTensors) -> tuple[list[Tensor], Returned]:
        """The tokens that the forward takes, [tokens, dim] and [batch, sequence, dim], and an output."""
        errors: list[Exception] = []
        output, others = Returned(None), []
        for width in widths:
            tokens = random.normal(TOKENS, width) / width**0.5
            inputs: list[Tensor] = []
            for hidden in (tokens, tokens.view(2, TOKENS // 2, width)):
                try:
                    new = self._forward(hidden)
                except Refused:
                    if inputs and self.adapter is not None and self.adapter.choice_is_hidden:
                        continue  # a gate of [tokens, dim] may take another dimension of this form for the experts
                    raise
                except Exception as error:  # a forward may raise anything on random tokens
                    errors.append(error)
                    continue
                if not self._has_all_tokens(new):  # it reshaped the tokens to another width
                    others.append(new)
                elif not inputs or self.adapter is not None or output_names(new[0]) == output_names(output[0]):
                    output = output if inputs else new
                    inputs.append(hidden)
            if inputs:
                return inputs, output
        if not others:
            raise self._failure(errors[0])
        return [], others[0]

    def _has_all_tokens(self, returned: Returned) -> bool:
        if self.adapter is None:
            return num_tokens_of(returned.output) == TOKENS
        try:
            read = self.adapter.read(returned.output, returned.logits, None)
        except Exception as error:
            raise Refused(
                f"its output cannot be read by {self.adapter!r}: {type(error).__name__}: {error}", ADAPTER
            ) from None
        if not all(isinstance(value, Tensor) and value.dim() >= 2 for value in read):
            raise Refused(f"{self.adapter!r} must read three tensors (logits, weights, expert_ids)", ADAPTER)
        logits, weights, expert_ids = read
        is_fit = weights.shape == expert_ids.shape and logits.shape[:-1].numel() == weights.shape[:-1].numel()
        if not is_fit or not logits.is_floating_point() or expert_ids.dtype != torch.int64:
            shapes = ", ".join(f"{tuple(value.shape)} {value.dtype}" for value in read)
            raise Refused(f"{self.adapter!r} reads {shapes}", ADAPTER)
        return logits.shape[:-1].numel() == TOKENS

    def _failure(self, error: Exception) -> Refused:
        """Why the forward failed on every input."""
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        was_training = self.router.training
        if any(p.dim() >= 2 and not p.is_floating_point() for p in self.router.parameters()):
            return Refused(
                f"its weights are quantised, and its forward raised {text}",
                "Attach before the weights are quantised, or keep routers out of the quantisation",
            )
        self.router.train(not was_training)
        try:
            self._forward(torch.zeros(TOKENS, matrix_widths(self.router)[0], device="cpu"))
        except Exception:
            return Refused(f"its forward raised {text}, on random tokens [{TOKENS}, dim]", CONTRACT)
        finally:
            self.router.train(was_training)
        mode, other = ("training", "eval()") if was_training else ("evaluation", "train()")
        return Refused(
            f"its forward raised {text}, in {mode} mode only",
            f"Take a version of the model that runs in {mode} mode, or call {other} before attach if it stays so",
        )

    def _forward(self, hidden: Tensor) -> Returned:
        seen = ChoicesSeen() if self.adapter is not None and self.adapter.choice_is_hidden else None
        kept_logits = KeepingLogits(self.router, self.adapter)
        with torch.no_grad(), torch.autocast("cpu", enabled=False), kept_logits, seen or nullcontext():
            output = self.router.forward(hidden.clone(), **self.arguments)  # some routers add noise in place
        if seen is None:
            return Returned(output, kept_logits.value)
        if len(seen.logits) != 1 or seen.expert_ids is None:
            calls = f"{len(seen.logits)} softmax, {len(seen.top_k)} top-k and {len(seen.maxima)} maxima over experts"
            raise Refused(f"its forward must take one softmax and make one choice, and takes {calls}", ADAPTER)
        return Returned((output, seen.expert_ids), seen.logits[0])

    def read(self, kind: RouterKind, returned: Returned) -> tuple[Tensor, Tensor, Tensor]:
        return kind.read(returned.output, self.k, returned.logits)

    def _tensors_by_expert(self) -> Iterator[tuple[str, ExpertTensor]]:
        generator = torch.Generator().manual_seed(2)
        places: list[tuple[str, dict[str, Any], bool]] = [("", self.arguments, True)]
        for path, module in self.router.named_modules():
            prefix = f"{path}." if path else ""
            places += [(prefix, place, True) for place in (module._parameters, module._buffers)]
            places.append((prefix, module.__dict__, False))
        for prefix, place, is_registered in places:
            for name, value in list(place.items()):
                if not isinstance(value, Tensor) or value.dim() == 0:
                    continue
                is_by_expert = self.num_experts in (value.shape[-1], value.numel())
                if not is_by_expert or not (value.is_floating_point() or value.dtype == torch.bool):
                    continue
                # All different, and then in the opposite order. Positive, for a tensor that is divided by.
                order = torch.randperm(value.numel(), generator=generator, device="cpu").view(value.shape)
                if value.is_floating_point():
                    first = 0.5 + order.float() / max(value.numel() - 1, 1)
                    second = 2 - first
                else:
                    first, second = order % 2 == 0, order % 2 == 1
                may_be_slot = is_registered and value.is_floating_point() and value.numel() == self.num_experts
                yield prefix + name, ExpertTensor(place, name, value.detach(), (first, second), may_be_slot)

    def fill(self, is_neutral: bool) -> None:
        for tensor in self.by_expert.values():
            tensor.put(tensor.neutral if is_neutral else tensor.random[0])

    @cached_property
    def acting(self) -> list[str]:
        """Names of the tensors on which the choice depends beyond the logits."""
        if not self.by_expert:
            return []
        names = []
        self.fill(is_neutral=False)
        logits, expert_ids = self._choice()
        for name, tensor in self.by_expert.items():
            tensor.put(tensor.random[1])
            new_logits, new_ids = self._choice()
            tensor.put(tensor.random[0])
            if torch.equal(logits, new_logits) and not torch.equal(expert_ids, new_ids):
                names.append(name)
        return names

    @cached_property
    def chooses_by_max(self) -> bool:
        """Whether it takes no top-k over the experts, but a maximum for each of its k experts."""
        zero, choices = torch.zeros(self.num_experts, device="cpu"), []
        for by_max in (False, True):
            top_k = BiasedTopK(zero, by_max=by_max, num_maxima=self.k)
            with top_k:
                self._forward(self.inputs[0])
            choices.append(top_k.num_choices)
        return choices == [0, self.runs]

    @property
    def num_maxima(self) -> int:
        """Of one choice, if it is made by maxima."""
        return self.k if self.chooses_by_max else 1

    def _choice(self) -> tuple[Tensor, Tensor]:
        kind = RouterKind("softmax", gives=self.read_by)  # of any score function
        logits, _, expert_ids = self.read(kind, self._forward(self.inputs[0]))
        return logits, expert_ids if self.k == self.num_experts else expert_ids.sort().values

    def run(self, hidden: Tensor, slot: str | None, bias: Tensor | None = None, is_neutral: bool = True) -> Returned:
        """What the forward returns with a bias in the slot, or 0."""
        self.fill(is_neutral)
        if slot is not None:
            tensor = self.by_expert[slot]
            tensor.put(torch.zeros_like(tensor.neutral) if bias is None else bias.view(tensor.neutral.shape))
        return self._forward(hidden)

    def run_plain(self, hidden: Tensor, slot: str | None, is_neutral: bool = True) -> Returned:
        """The same without a bias, computed once for all kinds."""
        key = (hidden.dim(), slot, is_neutral)
        if key not in self._plain:
            self._plain[key] = self.run(hidden, slot, is_neutral=is_neutral)
        return self._plain[key]


def _tensors_passed(router: nn.Module, parent: nn.Module | None) -> dict[str, Any]:
    """Tensors of the module around that it passes to the router's forward: an argument has the tensor's name."""
    if parent is None:
        return {}
    tensors = {**parent._buffers, **parent._parameters}
    return {name: tensors[name] for name in forward_arguments(router)[1:] if tensors.get(name) is not None}
