"""How a router selects, and the tensor of its own that steers it."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from equipoise.errors import EquipoiseError
from equipoise.routers.adapter import FORMS, OwnBalancing, RouterAdapter
from equipoise.routers.shapes import is_partitioned
from equipoise.routing import ScoreFunction, score

ADDED_SLOT = "_equipoise_bias"  # the buffer that attach adds to steer a router without a slot


class RouterKind(NamedTuple):
    """How a router selects. ``attach`` finds it out by experiment, and proves it.

    A module of yours with an attribute or property ``router_kind`` is proven as this kind and no other. It must have at
    least one 2-D parameter and return what ``gives`` says:

        logits          (logits [..., experts], weights [..., k], expert_ids [..., k], ...)
        probabilities   the same, with softmax probabilities in place of the logits
        dense           (scores [..., experts], logits [..., experts])
        an adapter      what the ``RouterAdapter`` reads

    The leading dimensions are tokens, or batch and sequence. Dense scores are zero for experts that were not chosen.

    Attributes:
        score_function: ``softmax``, ``sigmoid`` or ``sqrt_softplus``, which turns logits into scores.
        slot: the name of the float tensor that the router adds before the top-k; None if it has none. It is a buffer or
            a frozen parameter of the router, of a module inside it (``"moe_statics.e_score_correction_bias"``), or of
            the module around it that passes it to the router's forward.
        selection: what the router ranks, and so what a bias is added to: ``scores`` or ``logits``.
        gives: what its forward returns: ``logits``, ``probabilities``, ``dense``, or a ``RouterAdapter``.
    """

    score_function: ScoreFunction
    slot: str | None = None
    selection: Literal["scores", "logits"] = "scores"
    gives: Literal["logits", "probabilities", "dense"] | RouterAdapter = "logits"

    @property
    def adapter(self) -> RouterAdapter:
        """What reads and writes the router's output."""
        return FORMS[self.gives] if isinstance(self.gives, str) else self.gives

    def read(self, output: Any, k: int | None = None, logits: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """What the router's forward returned, as ``(logits, weights, expert_ids)`` with a row per token.

        Args:
            output: of the forward.
            k: experts per token, if it is known.
            logits: for an adapter that takes them from a method of the router.
        """
        logits, weights, expert_ids = map(_by_token, self.adapter.read(output, logits, k))
        return logits, weights, expert_ids

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        """The output of the router's forward with other weights of the same choice, in the shape that the router gave.

        Args:
            output: of the forward.
            weights: ``[tokens, k]``.
            expert_ids: ``[tokens, k]``, the choice in ``output``.
        """
        return self.adapter.write(output, weights, expert_ids)

    def ranked(self, logits: Tensor) -> Tensor:
        """What the router ranks, before a bias is added: the ``logits``, or their scores."""
        return logits if self.selection == "logits" else score(logits, self.score_function)


def _by_token(value: Tensor) -> Tensor:
    """[batch, sequence, n] as [tokens, n]."""
    return value if value.dim() == 2 else value.reshape(-1, value.shape[-1])


class Slot(NamedTuple):
    """The tensor that steers a router, by the module that holds it and its name there.

    Attributes:
        holder: the module.
        name: the name of a buffer or a parameter in it.
    """

    holder: nn.Module
    name: str

    @property
    def tensor(self) -> Tensor | None:
        """The tensor as the model holds it; of a replicated ``DTensor`` the local one. None if there is none.

        Raises ``EquipoiseError`` for a ``DTensor``, or a parameter under ZeRO-3, of which this rank has a part.
        """
        tensor: Any = self.holder._buffers.get(self.name)
        tensor = self.holder._parameters.get(self.name) if tensor is None else tensor
        if type(tensor).__name__ == "DTensor":
            if not all(placement.is_replicate() for placement in tensor.placements):
                raise EquipoiseError(
                    f"the bias of a router must be whole on every rank: {self.name} of a {type(self.holder).__name__} "
                    "is sharded. It is a parameter of this family; leave it out of fully_shard with ignored_params."
                )
            return tensor.to_local().detach()
        if tensor is not None and is_partitioned(tensor):
            raise EquipoiseError(
                f"the bias of a router must be whole on every rank: ZeRO-3 keeps a part of {self.name} of a "
                f"{type(self.holder).__name__}. It is a parameter of this family. Use ZeRO stage 2."
            )
        return None if tensor is None else tensor.detach()

    @property
    def bias(self) -> Float[Tensor, " experts"] | None:
        """The same, flat. Not a copy."""
        buffer = self.holder._buffers.get(self.name)
        if type(buffer) is Tensor and buffer.dim() == 1 and not buffer.requires_grad:
            return buffer  # by far the most frequent case, and asked for at every step
        tensor = self.tensor
        return None if tensor is None else tensor.view(-1)

    def replace(self, bias: Float[Tensor, " experts"]) -> None:
        """Puts a copy of ``bias`` in place of the tensor; dtype and device may change."""
        before = self.tensor
        copy: Any = bias.detach().clone().view(bias.shape if before is None else before.shape)
        in_model: Any = {**self.holder._buffers, **self.holder._parameters}.get(self.name)
        if type(in_model).__name__ == "DTensor":
            copy = in_model.from_local(copy, in_model.device_mesh, in_model.placements, run_check=False)
        if self.name in self.holder._parameters:
            self.holder._parameters[self.name].data = copy
        else:
            self.holder._buffers[self.name] = copy


class MoELayer(NamedTuple):
    """One mixture-of-experts layer: its router, and what was proven of it.

    Attributes:
        name: of the router in the model without wrappers.
        router: the module.
        kind: how it selects.
        num_experts: experts that it chooses from.
        k: experts per token.
        slot: the model's tensor that steers it; None if it has none of its own.
        obstacle: why no bias can steer it, or None. It can still be counted, and balanced by a loss.
        dimensions: of the inputs that it was proven on: 2 for ``[tokens, dim]``, 3 for ``[batch, sequence, dim]``.
        own_balancing: what its framework does to balance it.
        chooses_by_max: it chooses its experts one after another by maxima, not by a top-k.
        replay_obstacle: why no recorded choice can take the place of its own, or None.
        has_groups: it has no slot, and chooses expert groups first: the other experts lose their scores.
    """

    name: str
    router: nn.Module
    kind: RouterKind
    num_experts: int
    k: int
    slot: Slot | None  # None if the router has no tensor of its own that steers it
    obstacle: str | None = None  # why no bias can steer it; it can still be counted, and balanced by a loss
    dimensions: tuple[int, ...] = (2, 3)  # of the inputs that it was proven on: [tokens, dim], [batch, sequence, dim]
    own_balancing: OwnBalancing = OwnBalancing()
    chooses_by_max: bool = False
    replay_obstacle: str | None = None
    has_groups: bool = False

    @property
    def device(self) -> torch.device:
        """Where the router computes. FSDP2 with CPU offloading keeps its weights on the host between two forwards."""
        weight = next(self.router.parameters())
        mesh = getattr(weight, "device_mesh", None)  # of a DTensor
        if mesh is None or weight.device.type in (mesh.device_type, "meta"):
            return weight.device
        return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())

    def __repr__(self) -> str:
        obstacle = f", obstacle={self.obstacle!r}" if self.obstacle else ""
        return f"MoELayer({self.name!r}, num_experts={self.num_experts}, k={self.k}, kind={self.kind!r}{obstacle})"
