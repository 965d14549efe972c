"""The table of the experts of a layer, for a page without scripts. ``experts.js`` makes the same one for any layer."""

from typing import Any

import numpy as np

from equipoise_lab.analysis.reader import Experts

__all__ = ["experts_table"]

SPACES = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥"})


def experts_table(model: Experts, drawn: dict[str, Any]) -> dict[str, Any]:
    """``head``, ``rows`` of texts and the name of the ``layer``: the last one, its experts sorted by domain, then load.

    ``drawn`` is the model's data for the browser, which limits the number of typical tokens.
    """
    load = model.load[-1]  # domains, experts
    num_experts = load.shape[1]
    pooled = load.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = pooled * num_experts / pooled.sum()
        by_domain = np.nan_to_num(load * num_experts / load.sum(-1, keepdims=True))
    best = by_domain.argmax(0)
    order = sorted(range(num_experts), key=lambda e: (best[e], -by_domain[best[e], e], e))
    typical, partners = drawn["typical"][-1], drawn["partners"][-1]
    rows = []
    for expert in order:
        is_used = pooled[expert] > 0
        cells = [
            str(expert),
            "?" if np.isnan(share[expert]) else f"{share[expert]:.2f}",
            model.domains[best[expert]] if is_used else "–",
            f"{by_domain[best[expert], expert]:.2f}" if is_used else "–",
        ]
        if partners:
            cells.append(", ".join(f"{int(other)} ({_percent(part)} %)" for other, part in partners[expert]) or "–")
        tokens = typical[expert][:6] if typical else []
        cells.append(", ".join(f"“{text.translate(SPACES)}” ({_percent(part)} %)" for text, part, _ in tokens) or "–")
        rows.append(cells)
    head = ["Expert", "Load, × even", "Top domain", "× even in it", *(["Often with"] if partners else [])]
    return {"head": [*head, "Typical tokens"], "rows": rows, "layer": drawn["layers"][-1]}


def _percent(share: float) -> int:
    """Rounded as in JavaScript: halves up."""
    return int(np.floor(100 * share + 0.5))
