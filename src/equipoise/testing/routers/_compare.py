"""Comparisons of outputs, gradients, loads and choices; each fails with words for the message of an error."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.routers import RouterKind
from equipoise.routing import route, score
from equipoise.testing._common import case, require, require_same
from equipoise.testing.routers._subject import ObservedCall, count_by_hand


def require_same_bits(values: Sequence[Tensor], expected: Sequence[Tensor], subject: str) -> None:
    require(len(values) == len(expected), f"{len(values)} {subject} where {len(expected)} were expected")
    for value, expected_value in zip(values, expected, strict=True):
        require_same(value, expected_value, f"{subject} of other bits:")


def require_same_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    only_one_side = sorted(gradients.keys() ^ expected.keys())
    require(not only_one_side, f"gradients of {only_one_side} on one side only")
    for name, gradient in gradients.items():
        require_same_bits([gradient], [expected[name]], f"gradient of {name}")


def require_close_gradients(
    gradients: dict[str, Tensor], expected: dict[str, Tensor], dtypes: Sequence[torch.dtype] = ()
) -> None:
    """Compares the norm over all parameters, to the precision of the coarsest dtype."""
    names = gradients.keys() | expected.keys()
    differences = {name: _get(gradients, name, expected) - _get(expected, name, gradients) for name in names}
    norm = torch.stack([expected[name].double().norm() for name in expected]).norm()
    distance = torch.stack([difference.norm() for difference in differences.values()]).norm()
    coarsest = max(torch.finfo(dtype).eps for dtype in (*dtypes, *(value.dtype for value in expected.values())))
    rtol = 2e3 * coarsest  # sums over tokens, layers, channels
    worst = max(names, key=lambda name: float(differences[name].norm()))
    require(norm > 0, "a gradient of 0 everywhere: nothing can be compared")
    require(
        distance <= rtol * norm,
        f"a gradient that is off by {float(distance / norm):.3g} of its norm, most at {worst}",
    )


def _get(values: dict[str, Tensor], name: str, others: dict[str, Tensor]) -> Tensor:
    return values[name].double() if name in values else torch.zeros_like(others[name], dtype=torch.float64)


def require_load(loads: Mapping[str, Tensor], calls: Mapping[str, Sequence[ObservedCall]], batch: Any) -> None:
    """The loads equal the counts of these calls, made by hand."""
    for name, load in loads.items():
        require(calls[name], f"no call of {name} at all")
        expected = count_by_hand(calls[name], batch.get("attention_mask"))
        with case(layer=name):
            is_same = torch.equal(load.cpu(), expected)
            require(is_same, f"a load of {load.tolist()}, counted by hand {expected.tolist()}")


def expert_groups_of(router: nn.Module) -> dict[str, Any]:
    """The arguments of ``route`` for a router with expert groups."""
    for num_groups, top_groups in (
        ("num_groups", "top_groups"),
        ("num_group", "topk_group"),
        ("n_group", "topk_group"),
    ):
        values = getattr(router, num_groups, None), getattr(router, top_groups, None)
        if isinstance(values[0], int) and isinstance(values[1], int):
            return {"num_groups": values[0], "top_groups": values[1]}
    return {}


def require_best_experts(
    call: ObservedCall, router: nn.Module, kind: RouterKind, bias: Tensor, multiplies: bool
) -> None:
    """The experts that were chosen are the best by score and bias, each once. Ties may fall either way."""
    ids = call.expert_ids.sort(-1).values
    require((ids[:, 1:] != ids[:, :-1]).all(), "a token with the same expert twice")
    ranked = kind.ranked(call.logits.detach())
    bias = bias.to(ranked.device)
    biased = ranked * (1 + bias) if multiplies else ranked + bias
    k = call.expert_ids.shape[-1]
    if multiplies or kind.selection == "logits":
        best = biased.topk(k, dim=-1).indices
    else:
        best = route(
            call.logits.detach(), k, score_function=kind.score_function, bias=bias, **expert_groups_of(router)
        ).expert_ids
    chosen_values, best_values = (biased.gather(-1, ids).sort(-1).values for ids in (call.expert_ids, best))
    rounding = 4 * torch.finfo(biased.dtype).eps * biased.abs().max()
    is_wrong = (chosen_values - best_values).abs().amax(-1) > rounding
    token = int(is_wrong.long().argmax())
    require(
        not is_wrong.any(),
        f"token {token} with the experts {call.expert_ids[token].tolist()}, where the best by score and bias are "
        f"{best[token].tolist()}; {int(is_wrong.sum())} of {is_wrong.numel()} tokens are wrong",
    )


def require_plain_weights(call: ObservedCall, plain: ObservedCall, kind: RouterKind) -> None:
    """Weights of the same choice have the same bits; weights of any choice are the scores up to one factor per token.

    ``plain`` is the call of the model without equipoise with the same input.
    """
    require_same_bits([call.logits], [plain.logits], "logits")
    has_same_ids = (call.expert_ids == plain.expert_ids).all(-1)
    require_same_bits([call.weights[has_same_ids]], [plain.weights[has_same_ids]], "weights of the same choice")
    rtol = 64 * max(torch.finfo(dtype).eps for dtype in (call.weights.dtype, torch.float32))
    (ids, weights), (plain_ids, plain_weights) = (_sort_by_expert(c.expert_ids, c.weights) for c in (call, plain))
    has_same_set = (ids == plain_ids).all(-1)  # perhaps in another order, whose sum rounds differently
    errors = ((weights[has_same_set] / plain_weights[has_same_set]).double() - 1).abs()
    require((errors <= rtol).all(), f"weights of the same choice that are off by {_largest(errors):.3g}")
    factor = call.weights.double() / score(call.logits, kind.score_function).gather(-1, call.expert_ids).double()
    spread = (factor / factor[:, :1] - 1).abs()
    require((spread <= rtol).all(), f"weights that are not the scores of the chosen: off by {_largest(spread):.3g}")


def _largest(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0


def _sort_by_expert(ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    order = ids.argsort(-1)
    return ids.gather(-1, order), weights.gather(-1, order)
