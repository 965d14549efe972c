"""What is wrong while a model trains: loads of windows, one after another -> sentences, each said once.

Everything here follows from the loads (and the loss) alone: who reads them again from records hears the same.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.metrics import effective_experts

__all__ = ["Alert", "Alerts"]

PATIENCE = 20  # windows that something must last to be said, and be gone to be over: beginnings are uneven for a while
STILL_BUSY = 50  # windows in which an expert is pushed down and stays above twice the mean
EXPECTED = 100.0  # assignments that an even share would have been, of an expert that got none
COLLAPSED = 0.5  # of the experts or fewer, as ``effective_experts`` counts them


class Alert(NamedTuple):
    """Something that began, or is over. ``kind``: "nan", "collapse", "dead experts" or "slow rate"."""

    kind: str
    layers: tuple[str, ...]
    text: str
    over: bool = False

    def __str__(self) -> str:
        return self.text


class Alerts:
    """Watches the loads of a training and says what is wrong with them.

        alerts = equipoise.Alerts()
        ...
        balance.step()
        for alert in alerts.see(balance.load, loss.item(), balance.offsets):
            print(alert)

    - *collapse*: a layer is as uneven as half of its experts used alike, or fewer (``effective_experts``), for 20
      windows.
    - *dead experts*: no assignment for 20 windows and longer than an even share would have been 100. An expert with a
      tenth of an even share is idle that long by chance once in 20,000 times.
    - *slow rate*: an expert is above twice the mean for 50 windows, though its offset was moved against that each time.
    - *nan*: the loss, or an offset, is not finite.

    Each is said when it begins in a layer, and when it is over: it has not held for 20 windows. Loads are pooled, so
    all ranks hear the same; let one speak. The numbers are ours: no publication has any.

    Args:
        steers: whether offsets are moved; without, nothing is slow.
        num_steps: of the whole training, to say how many are left.
    """

    def __init__(self, *, steers: bool = True, num_steps: int | None = None):
        self.steers, self.num_steps, self.num_seen = steers, num_steps, 0
        self._uneven: dict[str, int] = {}  # windows in a row
        self._idle: dict[str, Float[Tensor, "2 experts"]] = {}  # windows, and an even share's assignments, in a row
        self._busy: dict[str, Int[Tensor, " experts"]] = {}  # windows in a row
        self._on: dict[tuple[str, str], int] = {}  # kind and layer -> windows that it has not held

    @property
    def holding(self) -> dict[str, list[str]]:
        """What holds now: the layers by kind."""
        found: dict[str, list[str]] = {}
        for kind, layer in self._on:
            found.setdefault(kind, []).append(layer)
        return found

    def see(
        self,
        load: Mapping[str, Int[Tensor, " experts"]],
        loss: float | None = None,
        offsets: Mapping[str, Float[Tensor, " experts"]] | None = None,
    ) -> list[Alert]:
        """Takes the loads of one more window, by layer, and returns what began or is over with it."""
        self.num_seen += 1
        now: dict[str, dict[str, str]] = {"nan": {}, "collapse": {}, "dead experts": {}, "slow rate": {}}
        if loss is not None and not math.isfinite(loss):
            now["nan"]["the loss"] = "the loss"
        for layer, offset in (offsets or {}).items():
            if not bool(offset.isfinite().all()):
                now["nan"][layer] = f"the offset of {layer}"
        for names, counts in _by_size(load):
            self._see(names, counts, now)
        return list(self._changes(now))

    def _see(self, names: list[str], counts: Int[Tensor, "layers experts"], now: dict[str, dict[str, str]]) -> None:
        num_experts = counts.shape[-1]
        mean = counts.double().mean(-1, keepdim=True)
        if not bool((mean > 0).all()):
            return
        effective = effective_experts(counts).tolist()
        idle = torch.stack([self._idle.get(name, torch.zeros(2, num_experts, dtype=torch.float64)) for name in names])
        idle = torch.where((counts == 0)[:, None], idle + torch.stack([torch.ones_like(mean), mean], 1), 0.0)
        busy = torch.stack([self._busy.get(name, torch.zeros(num_experts, dtype=torch.int64)) for name in names])
        busy = torch.where(counts > 2 * mean, busy + 1, 0)
        dead = (idle[:, 0] >= PATIENCE) & (idle[:, 1] >= EXPECTED)
        slow = busy >= STILL_BUSY
        for row, name in enumerate(names):
            self._idle[name], self._busy[name] = idle[row], busy[row]
            uneven = effective[row] <= COLLAPSED * num_experts
            self._uneven[name] = self._uneven.get(name, 0) + 1 if uneven else 0
            if self._uneven[name] >= PATIENCE or (uneven and ("collapse", name) in self._on):
                now["collapse"][name] = f"{name} is as uneven as {effective[row]:.1f} of {num_experts} experts"
        for name, experts in _listed(names, dead):
            now["dead experts"][name] = f"{name}: {_some(experts)} (of {num_experts})"
        for name, experts in _listed(names, slow) if self.steers else ():
            violation = float(counts[names.index(name)].max() / mean[names.index(name)] - 1)
            now["slow rate"][name] = f"{name}: {_some(experts)} (of {num_experts}, MaxVio {violation:.1f})"

    def _changes(self, now: Mapping[str, Mapping[str, str]]) -> Iterable[Alert]:
        for kind, found in now.items():
            new = [layer for layer in found if (kind, layer) not in self._on]
            self._on.update(((kind, layer), 0) for layer in found)
            if new:
                yield Alert(kind, tuple(new), self._said(kind, [found[layer] for layer in new]))
            over = []
            for layer in [layer for there, layer in self._on if there == kind and layer not in found]:
                self._on[kind, layer] += 1
                if self._on[kind, layer] >= PATIENCE:
                    del self._on[kind, layer]
                    over.append(layer)
            if over:
                yield Alert(kind, tuple(over), f"over: {kind} of {_some(over)}", over=True)

    def _said(self, kind: str, found: list[str]) -> str:
        listed = "; ".join(found[:4]) + (f"; and {len(found) - 4} more layers" if found[4:] else "")
        if kind == "nan":
            return (
                f"not finite: {listed}. The training has diverged; go back to a checkpoint, with a lower learning rate."
            )
        if kind == "collapse":
            return f"collapse: {listed}. Take a larger coefficient or rate, or another mechanism."
        if kind == "dead experts":
            return (
                f"dead experts: {listed} got no token for at least {PATIENCE} windows. An offset, loss-free or "
                "quantile, brings them back; a loss does slowly."
            )
        left = "" if self.num_steps is None else f", and {max(0, self.num_steps - self.num_seen)} steps are left"
        return f"slow rate: above twice the mean for {STILL_BUSY} windows{left}: {listed}. Raise the rate."


def _by_size(load: Mapping[str, Int[Tensor, " experts"]]) -> Iterable[tuple[list[str], Int[Tensor, "layers experts"]]]:
    sizes: dict[int, list[str]] = {}
    for name, counts in load.items():
        sizes.setdefault(len(counts), []).append(name)
    for names in sizes.values():
        yield names, torch.stack([load[name] for name in names]).cpu()


def _listed(names: list[str], which: Bool[Tensor, "layers experts"]) -> Iterable[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for row, expert in which.nonzero().tolist():
        found.setdefault(names[row], []).append(str(expert))
    return found.items()


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")
