"""What is wrong while a model trains: loads of windows, one after another -> sentences, each said once.

Loads are added up over a stretch of windows and judged at its end: what chance does in one window, and an unevenness
that comes and goes, says nothing, and a GPU is waited for only then. All but nan follows from the loads alone: who
reads them again from records hears the same.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.errors import EquipoiseError
from equipoise.metrics import effective_experts, max_violation, sampling_floor

__all__ = ["Alert", "Alerts"]

PATIENCE = 20  # windows of a stretch: beginnings are uneven for a while, and a batch may lack a domain
ENOUGH = 30.0  # assignments of an even share in it: chance leaves an expert without any once in e^30 times, 10^13
COLLAPSED, SPREAD = 0.5, 0.6  # of the experts, as ``effective_experts`` counts them: begins, is over
ALIVE = 0.1  # of an even share: with less a dead expert is not back
BUSY = 1.0  # MaxVio of a layer whose busiest expert has twice its share
TRAVELLED = (
    200  # windows on one way, 0.2 at the published rate of 1e-3; of a shorter run a quarter, two stretches at least
)


class Alert(NamedTuple):
    """Something that began in these layers, or is over there.

    ``kind``: "nan", "collapse", "dead experts" or "slow rate". ``experts``: by layer, those that are dead or slow.
    ``step``: the number of the window that said it, from 1.
    """

    kind: str
    layers: tuple[str, ...]
    text: str
    over: bool = False
    experts: tuple[tuple[int, ...], ...] = ()
    step: int = 0

    def __str__(self) -> str:
        return self.text


class _Group:
    """The layers with the same number of experts, in a stretch of windows."""

    def __init__(self, names: tuple[str, ...], counts: Int[Tensor, "layers experts"]):
        self.names = names
        self.counts = torch.zeros_like(counts)  # of the stretch
        self.pushed = torch.zeros_like(counts)  # windows in a row in which an expert was above the mean
        rows = torch.zeros(len(names), dtype=torch.float64)
        self.windows, self.last_windows = rows, rows.clone()  # of the stretch, and of the one before
        self.last_violation = torch.full_like(rows, math.nan)
        self.collapsed, self.slow = torch.zeros(len(names), dtype=torch.bool), torch.zeros(counts.shape).bool()
        self.dead = self.slow.clone()
        self.num_windows = 0  # since it was judged

    def add(self, counts: Int[Tensor, "layers experts"]) -> None:
        """Waits for no GPU."""
        if self.counts.device != counts.device:
            self.counts, self.pushed = self.counts.to(counts.device), self.pushed.to(counts.device)
        above = counts * counts.shape[-1] > counts.sum(-1, keepdim=True)
        self.counts += counts
        was_called = counts.sum(-1, keepdim=True) > 0  # a window without a call says nothing of a layer
        self.pushed = torch.where(was_called, (self.pushed + 1) * above, self.pushed)
        self.windows += 1
        self.num_windows += 1

    def state(self) -> dict[str, Any]:
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, there in vars(self).items():
            value = state[name]
            setattr(self, name, value.clone().to(there.device) if isinstance(there, Tensor) else value)


class Alerts:
    """Watches the loads of a training and says what is wrong with them.

        alerts = equipoise.Alerts(num_steps=1000)
        ...
        balance.step()
        for alert in alerts.see(balance.load, loss, balance.biases):
            print(alert)

    Loads are added up over a stretch: 20 windows, and more until an even share is 30 assignments. At its end:

    - *collapse*: a layer is as uneven as half of its experts used alike, or fewer (``effective_experts``). Over above
      0.6 of them.
    - *dead experts*: no assignment in the stretch, where an even share is at least 30. Over with a tenth of an even
      share.
    - *slow rate*: the busiest expert has more than twice its share, MaxVio is above 3 times what chance gives, and the
      expert was above the mean, so that its bias was moved down, in each of the last windows: 200, or a quarter of a
      shorter run, and 40 at least. Not where MaxVio falls so fast from stretch to stretch that it gets there within the
      steps that are left. Over where it is not so busy any more, or was below the mean.
    - *nan*: the loss, or a bias, is not finite. Over after a stretch in which all were.

    Each is said when it begins for a layer or expert, and when it is over. Loads are pooled, so all ranks hear the
    same; let one speak. What lies on a GPU is looked at when a stretch ends, nan on a CPU at once. The numbers are
    ours: no publication has any.

    Args:
        steers: whether biases are moved by a rate; without, nothing is slow. It may be set again at any time.
        num_steps: of the whole training, to say whether it can be in time.
        num_seen: windows that were trained before; ``load_state_dict`` sets it too.
    """

    def __init__(self, *, steers: bool = True, num_steps: int | None = None, num_seen: int = 0):
        self.steers, self.num_steps, self.num_seen = steers, num_steps, num_seen
        self._groups: dict[tuple[str, ...], _Group] = {}
        self._bad: dict[tuple[str, ...], Bool[Tensor, " names"]] = {}  # not finite since the stretch of nan began
        self._nan: list[str] = []  # what holds

    @property
    def holding(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """What holds now: by kind the layers, and of each the experts that are dead or slow."""
        found: dict[str, dict[str, tuple[int, ...]]] = {"nan": dict.fromkeys(self._nan, ())}
        found |= {"collapse": {}, "dead experts": {}, "slow rate": {}}
        for group in self._groups.values():
            found["collapse"] |= {group.names[row]: () for row in group.collapsed.nonzero()[:, 0].tolist()}
            found["dead experts"] |= _listed(group.names, group.dead)
            found["slow rate"] |= _listed(group.names, group.slow)
        return {kind: layers for kind, layers in found.items() if layers}

    @property
    def mark(self) -> str:
        """What holds now, in a few words for a line of progress: "3 dead experts, collapse of 2 layers"."""
        words = []
        for kind, layers in self.holding.items():
            dead = sum(map(len, layers.values()))
            more = f" of {len(layers)} layers" if len(layers) > 1 else ""
            words.append(f"{dead} dead expert{'s' * (dead > 1)}" if kind == "dead experts" else f"{kind}{more}")
        return ", ".join(words)

    def see(
        self,
        load: Mapping[str, Int[Tensor, " experts"]],
        loss: float | Tensor | None = None,
        biases: Mapping[str, Float[Tensor, " experts"]] | None = None,
    ) -> list[Alert]:
        """Takes the loads of one more window, by layer, and returns what began or is over with it."""
        self.num_seen += 1
        found = list(self._see_nan(loss, biases or {}))
        for names, counts in _by_size(load):
            group = self._groups.get(names)
            if group is None or group.counts.shape != counts.shape:
                group = self._groups[names] = _Group(names, counts)
            group.add(counts)
            if group.num_windows >= PATIENCE:
                found += self._judge(group)
        return found

    def state_dict(self) -> dict[str, Any]:
        """To go on after a resume without saying anything twice. Records will do too: ``see`` the loads again."""
        return {
            "num_seen": self.num_seen,
            "groups": [group.state() for group in self._groups.values()],
            "bad": {names: bad.cpu() for names, bad in self._bad.items()},
            "nan": list(self._nan),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or not {"num_seen", "groups", "bad", "nan"} <= state.keys():
            raise EquipoiseError(f"the state must be what Alerts.state_dict() gave: got {type(state).__name__}.")
        self.num_seen, self._nan, self._bad = state["num_seen"], list(state["nan"]), dict(state["bad"])
        self._groups = {}
        for held in state["groups"]:
            self._groups[held["names"]] = group = _Group(held["names"], held["counts"])
            group.load(held)

    # ---- nan ----

    def _see_nan(self, loss: float | Tensor | None, biases: Mapping[str, Tensor]) -> Iterator[Alert]:
        seen: list[tuple[tuple[str, ...], Tensor]]
        seen = [] if loss is None else [(("the loss",), torch.as_tensor(loss).detach().isfinite().all().view(1))]
        seen += [(names, bias.isfinite().all(-1)) for names, bias in _by_size(biases)]
        ends = self.num_seen % PATIENCE == 0
        for names, finite in seen:
            bad = self._bad.get(names)
            bad = self._bad[names] = ~finite if bad is None else bad.to(finite.device) | ~finite
            if not ends and (bad.device.type != "cpu" or not bool(bad.any())):
                continue
            found = [name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad]
            new = [name for name in found if name not in self._nan]
            over = [name for name in self._nan if ends and name in names and name not in found]
            self._nan = [name for name in self._nan if name not in over] + new
            if new:
                what = _some(["the loss" if name == "the loss" else f"a bias of {name}" for name in new])
                text = (
                    f"nan: not finite: {what}. Training diverged: go back to a checkpoint, with a lower learning rate."
                )
                yield Alert("nan", tuple(new), text, step=self.num_seen)
            if over:
                text = f"over: nan: {_some(over)}"
                yield Alert("nan", tuple(over), text, over=True, step=self.num_seen)
            if ends:
                del self._bad[names]

    # ---- loads ----

    def _judge(self, group: _Group) -> Iterator[Alert]:
        """At the end of a stretch; layers with too few assignments go on with theirs."""
        group.num_windows = 0
        counts, pushed = torch.stack([group.counts, group.pushed]).cpu()  # the only wait for a GPU
        num_experts, mean = counts.shape[-1], counts.double().mean(-1)
        judged = mean >= ENOUGH
        if not bool(judged.any()):
            return
        yield from self._judge_collapse(group, judged, effective_experts(counts))
        dead = (counts == 0) | (group.dead & (counts < ALIVE * mean[:, None]))
        dead = torch.where(judged[:, None], dead, group.dead)
        yield from self._judge_dead(group, dead, mean)
        violation = max_violation(counts)
        floor = sampling_floor(1, 1, num_experts) / counts.sum(-1).clamp_min(1).double().sqrt()
        yield from self._judge_slow(group, judged, counts.argmax(-1), pushed, violation, floor)
        group.last_violation = torch.where(judged, violation, group.last_violation)
        group.last_windows = torch.where(judged, group.windows, group.last_windows)
        group.windows = torch.where(judged, 0.0, group.windows)
        group.counts *= ~judged[:, None].to(group.counts.device)

    def _judge_collapse(self, group: _Group, judged: Tensor, effective: Tensor) -> Iterator[Alert]:
        num_experts = group.counts.shape[-1]
        held = (effective <= COLLAPSED * num_experts) | (group.collapsed & (effective <= SPREAD * num_experts))
        held = torch.where(judged, held, group.collapsed)
        what = {
            row: f"{group.names[row]} is as uneven as {effective[row]:.1f} of {num_experts} experts"
            for row in _at(held)
        }
        before, group.collapsed = group.collapsed, held
        remedy = "Take a larger coefficient or rate, or another mechanism."
        yield from self._changes("collapse", group, before[:, None], held[:, None], what, remedy)

    def _judge_dead(self, group: _Group, held: Tensor, mean: Tensor) -> Iterator[Alert]:
        new = held & ~group.dead
        what = {}
        for row in _at(new.any(-1)):
            experts = _some([str(expert) for expert in _at(new[row])])
            what[row] = (
                f"{group.names[row]}: {experts} (of {held.shape[-1]}) got no token in {int(group.windows[row])} "
                f"windows, where an even share is {mean[row]:,.0f}"
            )
        before, group.dead = group.dead, held
        remedy = "A larger rate of loss-free brings them back sooner, quantile at once; a loss does slowly."
        yield from self._changes("dead experts", group, before, held, what, remedy)

    def _judge_slow(
        self,
        group: _Group,
        judged: Bool[Tensor, " layers"],
        busiest: Int[Tensor, " layers"],
        pushed: Int[Tensor, "layers experts"],
        violation: Float[Tensor, " layers"],
        floor: Float[Tensor, " layers"],
    ) -> Iterator[Alert]:
        left = None if self.num_steps is None else max(0, self.num_steps - self.num_seen)
        enough = TRAVELLED if self.num_steps is None else max(2 * PATIENCE, min(TRAVELLED, self.num_steps // 4))
        mark = torch.maximum(3 * floor, torch.full_like(floor, BUSY))
        way = pushed.gather(-1, busiest[:, None])[:, 0]
        fall = (group.last_violation - violation) / ((group.last_windows + group.windows) / 2)  # of a window
        more = torch.where(fall > 0, (violation - mark) / fall - group.windows / 2, math.inf).clamp_min(1)
        far = judged & (violation > mark) & self.steers
        begins = far & (way >= enough) & fall.isfinite() & (more > (-1 if left is None else left))
        place = torch.nn.functional.one_hot(busiest, group.slow.shape[-1]).bool()
        stays = far & (way >= PATIENCE) & group.slow.any(-1)
        held = torch.where(judged[:, None], place & (begins | stays)[:, None], group.slow & self.steers)
        what = {}
        for row in _at(held.any(-1)):
            length = (
                f"about {more[row]:,.0f} more steps"
                if math.isfinite(more[row])
                else "no end in sight, MaxVio does not fall"
            )
            what[row] = (
                f"{group.names[row]}: {int(busiest[row])} (of {held.shape[-1]}) has {violation[row] + 1:.1f} times its "
                f"share though its bias was moved down in each of the last {int(way[row])} windows; at this rate "
                f"{length}"
            )
        before, group.slow = group.slow, held
        remedy = "" if left is None else f"{left:,} steps are left. " if left else "No step is left. "
        remedy += "Raise the rate."
        yield from self._changes("slow rate", group, before, held, what, remedy)

    def _changes(
        self, kind: str, group: _Group, before: Tensor, held: Tensor, what: Mapping[int, str], remedy: str
    ) -> Iterator[Alert]:
        """What began and what is over, ``[layers, experts]`` or ``[layers, 1]``. A layer is slow once, whichever expert
        is its busiest."""
        by_expert = kind == "dead experts"
        new, over = (held & ~before), (before & ~held)
        if not by_expert:
            new, over = held & ~before.any(-1, keepdim=True), before & ~held.any(-1, keepdim=True)
        for which, is_over in ((new, False), (over, True)):
            rows = _at(which.any(-1))
            if not rows:
                continue
            names = [group.names[row] for row in rows]
            experts = tuple(tuple(_at(which[row])) if which.shape[-1] > 1 else () for row in rows)
            if is_over:
                listed = [
                    f"{n}: {_some(list(map(str, e)))}" if by_expert else n for n, e in zip(names, experts, strict=True)
                ]
                text = f"over: {kind}: {_few(listed)}"
            else:
                text = f"{kind}: {_few([what[row] for row in rows])}. {remedy}"
            yield Alert(kind, tuple(names), text, is_over, experts, self.num_seen)


def _by_size(
    values: Mapping[str, Tensor],
) -> Iterable[tuple[tuple[str, ...], Tensor]]:
    """Stacked ``[layers, experts]``, those with the same number of experts together."""
    sizes: dict[int, list[str]] = {}
    for name, value in values.items():
        sizes.setdefault(value.shape[-1], []).append(name)
    for names in sizes.values():
        yield tuple(names), torch.stack([values[name].detach() for name in names])


def _at(which: Bool[Tensor, " rows"]) -> list[int]:
    return which.nonzero()[:, 0].tolist()


def _listed(names: tuple[str, ...], which: Bool[Tensor, "layers experts"]) -> dict[str, tuple[int, ...]]:
    return {names[row]: tuple(_at(which[row])) for row in _at(which.any(-1))}


def _some(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if names[6:] else "")


def _few(layers: list[str]) -> str:
    return "; ".join(layers[:4]) + (f"; and {len(layers) - 4} more layers" if layers[4:] else "")
