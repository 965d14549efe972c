"""How sure routers are of the experts that they choose: logits and choice of a forward -> top-k score sum."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.routing import score
from equipoise.taps.families import find_routers
from equipoise.taps.tap import RouterKind

__all__ = ["topk_score_sums"]


@contextmanager
def topk_score_sums(model: nn.Module) -> Iterator[dict[str, float]]:
    """Watches the routers while it is open; yields by layer, filled at the end, the sum over the tokens of

        sum_{e chosen} s_e / sum_j s_j,     s the gate's scores without any offset, before the chosen are renormalised

    Of one token that is k/E where all scores are equal and 1 where all the score is on the chosen: divide by the tokens
    for the mean. With an offset it may be below k/E. Source: Qiu et al. 2025, arXiv:2501.11873, Fig. 4a.
    """
    sums: dict[str, float] = {}
    totals: dict[str, Tensor] = {}
    hooks = []

    def watch(name: str, kind: RouterKind, k: int) -> Any:
        def hook(router: nn.Module, args: Any, output: Any) -> None:
            logits, _, expert_ids = kind.read(output, k)
            scores = score(logits.detach(), kind.gate)
            whole = scores.sum(-1).clamp_min(torch.finfo(scores.dtype).tiny)
            totals[name] = totals[name] + (scores.gather(-1, expert_ids).sum(-1) / whole).double().sum().cpu()

        return hook

    try:
        for name, router, kind, _, _, k in find_routers(model):
            totals[name] = torch.zeros((), dtype=torch.float64)
            hooks.append(router.register_forward_hook(watch(name, kind, k)))
        yield sums
        sums.update((name, float(total)) for name, total in totals.items())
    finally:
        for handle in hooks:
            handle.remove()
