"""How a kind of router is called and what it returns: ``RouterAdapter``, and the three forms that need none."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.errors import EquipoiseError

__all__ = ["FORMS", "OwnBalancing", "RouterAdapter"]


class OwnBalancing(NamedTuple):
    """What else balances a router: the framework that it comes from.

    Attributes:
        bias_update: the option by which the framework moves the bias, with its value; None if it does not.
        stop: switches this update off, and returns the function that switches it on again.
        loss: the option by which the framework adds a balancing loss, with its value; None if it does not.
        z_loss: the same of a z-loss on the router's logits.
    """

    bias_update: str | None = None
    stop: Callable[[], Callable[[], None]] | None = None
    loss: str | None = None
    z_loss: str | None = None


class RouterAdapter:
    """How one kind of router is called, read and written.

    A router that returns ``(logits, weights, expert_ids)`` needs none. For another one, subclass this, and give the
    router's class, or the router, an attribute ``router_adapter`` with an instance:

        class WeightsFirst(equipoise.RouterAdapter):
            def read(self, output, logits, k):
                weights, logits, expert_ids = output
                return logits, weights, expert_ids

            def write(self, output, weights, expert_ids):
                return weights.view(output[0].shape), *output[1:]

        TheirRouter.router_adapter = WeightsFirst()

    The score function, the bias and k are found out by experiment all the same, and proven.

    Attributes:
        is_sequence_first: the router's tokens stand ``[sequence, batch]``, as in Megatron.
        attention_mask_hides: True in the framework's masks of queries and keys says that a token may not attend, as in
            Megatron. In Transformers and torch it may.
        logits_returned_by: the method of the router, or the module inside it, that returns its logits, if its forward
            does not.
        logits_passed_to: the method of the router that is called with its logits as the first argument, likewise.
        choice_is_hidden: the output does not show the choice, as where tokens are dropped after it. Logits and choice
            are then read inside the forward: at its one softmax over the experts, and at its one top-k, or at the
            maxima by which it chooses one expert after another. ``read`` gets ``(output, expert_ids)`` as the output.
        framework: what the router belongs to, with the version that was tested, for messages.
        remedy: what to do about a ``refusal``, for its message.
    """

    is_sequence_first: bool = False
    attention_mask_hides: bool = False
    logits_returned_by: str | None = None
    logits_passed_to: str | None = None
    choice_is_hidden: bool = False
    framework: str = ""
    remedy: str = "Switch that off, or leave the router out with attach(where=...)"

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """What a forward returned, as ``(logits [..., experts], weights [..., k], expert_ids [..., k])``.

        The leading dimensions are those of the tokens, and the same for all three.

        Args:
            output: of the router's forward.
            logits: what ``logits_returned_by`` or ``logits_passed_to`` says; None without them.
            k: experts per token, if it is known; else find it in ``output``.
        """
        raise NotImplementedError

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        """The output of the forward with other weights of the same choice, in the shape that the router gave.

        Args:
            output: of the router's forward.
            weights: ``[tokens, k]``.
            expert_ids: ``[tokens, k]``, the choice in ``output``.
        """
        raise NotImplementedError

    def arguments(self, num_tokens: int) -> Mapping[str, Any]:
        """What the block passes to the forward beside the tokens, by name, if no token is padding.

        Args:
            num_tokens: in the call.
        """
        return {}

    def mask(self, arguments: Mapping[str, Any]) -> Tensor | None:
        """1 for each token of a call that counts, 0 for padding: ``[batch, sequence]``, or ``[tokens]``.

        Args:
            arguments: of the router's forward, by name; ``self`` is the router.

        Returns:
            None if the arguments do not say it. Then the mask of the model's forward applies.
        """
        return None

    def layer_name(self, router: Any, name: str) -> str:
        """The name of a layer in the whole model. Change it if a pipeline stage numbers its layers by itself.

        Args:
            router: the module.
            name: its name in the model that was attached.
        """
        return name

    def width(self, router: Any) -> int | None:
        """The size of the tokens that the router takes, if it has no matrix of weights that shows it.

        Args:
            router: as the model holds it.
        """
        return None

    def prepare(self, stand_in: Any) -> None:
        """Changes a stand-in, so that its forward runs on a CPU.

        Args:
            stand_in: of the router, with random weights, on which the proof tries its forward.
        """

    def refusal(self, router: Any) -> str | None:
        """Why a router cannot be counted right, or None: options of it under which ``read`` does not see the choice.

        Args:
            router: as the model holds it.
        """
        return None

    def own_balancing(self, router: Any, parent: Any) -> OwnBalancing:
        """What its framework does to balance the router.

        Args:
            router: as the model holds it.
            parent: the module that holds it.
        """
        return OwnBalancing()

    def own_loss(self, output: Any) -> Tensor | None:
        """A balancing loss that the router returns, for its caller to add to the training loss or not.

        ``attach`` warns once if it is added.

        Args:
            output: of the router's forward.

        Returns:
            A scalar with its graph; None if there is none in the output.
        """
        return None

    def __eq__(self, other: object) -> bool:  # the adapters of two ranks are the same
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(type(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class _Triple(RouterAdapter):
    """(logits, weights, expert_ids, ...)"""

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        return output[0], output[1], output[2]

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        return (output[0], weights if output[1].dim() == 2 else weights.view(output[1].shape), *output[2:])


class _Probabilities(_Triple):
    """The same, with softmax probabilities in place of the logits."""

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        probabilities = output[0]
        return probabilities.clamp_min(torch.finfo(probabilities.dtype).tiny).log(), output[1], output[2]


class _Dense(RouterAdapter):
    """(scores, logits), both with a number for each token and expert; scores of experts not chosen are 0."""

    def read(self, output: Any, logits: Tensor | None, k: int | None) -> tuple[Tensor, Tensor, Tensor]:
        dense, dense_logits = output
        expert_ids = dense.detach().topk(int((dense != 0).sum(-1).max()) if k is None else k, dim=-1).indices
        return dense_logits, dense.gather(-1, expert_ids), expert_ids

    def write(self, output: Any, weights: Tensor, expert_ids: Tensor) -> Any:
        dense, dense_logits = output
        by_token = dense if dense.dim() == 2 else dense.reshape(-1, dense.shape[-1])
        return torch.zeros_like(by_token).scatter(-1, expert_ids, weights).view(dense.shape), dense_logits


FORMS: dict[str, RouterAdapter] = {"logits": _Triple(), "probabilities": _Probabilities(), "dense": _Dense()}


def declared_adapter(module: nn.Module) -> RouterAdapter | None:
    """The attribute ``router_adapter`` of a router or its class."""
    # Not by getattr: wrappers of torch.compile and checkpointing would answer for the module inside.
    holders = (module.__dict__, *map(vars, type(module).__mro__))
    if not any(holder.get("router_adapter") is not None for holder in holders):
        return None
    declared: Any = module.router_adapter
    if not isinstance(declared, RouterAdapter):
        raise EquipoiseError(
            f"router_adapter of a {type(module).__name__} must be an instance of a subclass of "
            f"equipoise.RouterAdapter: got {declared!r}."
        )
    return declared
