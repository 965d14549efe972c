"""The invariants of a model's routers under ``attach``, tried on copies of the model.

A forward hook of this package records what each router decided, and the counts are made from that. The gradient of the
balancing loss is compared with a formula written here, by autograd through the model without equipoise.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.testing._common import run_invariants
from equipoise.testing.routers import attaching, choice, copies, counts, loss
from equipoise.testing.routers._subject import Subject, Where

__all__ = ["ROUTER_INVARIANTS", "check_routers"]

_INVARIANTS: dict[str, Callable[[Subject], None]] = {
    "unchanged at bias zero": choice.is_unchanged_at_bias_zero,
    "bias moves the choice only": choice.follows_a_bias,
    "factor moves the choice only": choice.follows_a_factor,
    "counts each token once": counts.count_each_token_once,
    "recomputation is not counted": counts.do_not_count_recomputation,
    "measuring counts evaluation": counts.measure_an_evaluation,
    "padding is not counted": counts.do_not_count_padding,
    "loss gradient": loss.has_the_right_gradient,
    "step reaches the router": choice.follows_a_step,
    "copies": copies.are_independent,
    "pickle": copies.survive_a_pickle,
    "state dict": copies.share_the_state_dict,
    "cast keeps float32 biases": copies.keep_float32_biases,
    "attached once": attaching.happens_once,
    "detach restores": attaching.is_undone_by_detach,
}
ROUTER_INVARIANTS: tuple[str, ...] = tuple(_INVARIANTS)
"""The names of all invariants of a model's routers, for ``check_routers(..., only=name)``."""


def check_routers(
    model: nn.Module, batch: Mapping[str, Any] | None = None, *, only: str | None = None, where: Where | None = None
) -> tuple[str, ...]:
    """Checks every invariant of the routers of one model under ``attach``, or ``only`` one.

    Works on copies: the model stays as it is.

    Args:
        model: any model that ``attach`` accepts. Its routers must prefer some experts to others. In training mode two
            runs with the same seed must give the same bits.
        batch: keyword arguments of the model's forward; its output must be a tensor or have a ``loss`` or ``logits``.
            Default: random ``input_ids`` (2, 16) below ``model.config.vocab_size``, also as ``labels`` if the forward
            takes any.
        only: one of ``ROUTER_INVARIANTS``.
        where: ``where(name, router) -> bool``, as for ``attach``.

    Returns:
        The names of the invariants that apply to it.

    Raises:
        ConformanceError: at the first that does not hold.
        TypeError: ``model`` is not a module.
        ValueError: the model is attached, or a copy of one that is; it has no ``config.vocab_size``, so ``batch`` must
            be given; or ``only`` is not an invariant.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module: got {type(model).__name__}.")
    if any("_equipoise" in module.__dict__ for module in model.modules()):
        raise ValueError(
            "model must be as it is before attach: got one that is attached, or a copy of one. Call detach() on its "
            "Balance first, or build it anew."
        )
    subject = Subject(model, _random_batch(model) if batch is None else dict(batch), where)
    shapes = {name: tuple(value.shape) for name, value in subject.batch.items() if isinstance(value, Tensor)}
    inputs: dict[str, object] = {"model": type(model).__name__, "batch": shapes}
    return run_invariants(_INVARIANTS, only, [(inputs, (subject,))])


def _random_batch(model: nn.Module) -> dict[str, Tensor]:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise ValueError(
            f"batch must be given for a model without config.vocab_size: got none for a {type(model).__name__}. Pass "
            "the keyword arguments of its forward."
        )
    device = next(model.parameters()).device
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    takes_labels = "labels" in inspect.signature(model.forward).parameters
    return {"input_ids": ids, "labels": ids} if takes_labels else {"input_ids": ids}
