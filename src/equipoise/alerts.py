"""Watches a training run through its loads: windows, one after another -> sentences about what is wrong.

Loads are judged at the end of a stretch of windows, so chance in a single window and passing imbalance raise no alert.
Alerts follow from loads, losses, biases and the arguments of ``Alerts`` alone. So reading these again from records
gives the same alerts.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from equipoise._remedies import remedy
from equipoise.errors import EquipoiseError
from equipoise.metrics import effective_experts, max_violation, sampling_floor

__all__ = ["Alert", "Alerts"]

PATIENCE = 20  # windows in a stretch: the first windows are uneven, and a batch may lack a domain
MIN_SHARE = 30.0  # mean assignments per expert in a stretch: an even router leaves one empty once in e^30 = 10^13
COLLAPSE_BELOW, SPREAD_ABOVE = 0.5, 0.6  # ``effective_experts`` over experts: a collapse starts and ends
REVIVED_SHARE = 0.1  # of an even share: with less, a dead expert stays dead
BUSY_VIOLATION = 1.0  # MaxVio of a layer whose busiest expert has twice its share
SLOW_WINDOWS = 200  # at the published rate of 1e-3 a bias moves by 0.2 in them
FLAGS = {"collapse": "collapsed", "dead experts": "dead", "slow rate": "slow"}  # what a _Stretch knows of each problem
Counts = Int[Tensor, "layers experts"]


class Alert(NamedTuple):
    """A problem that started in these layers, or ended.

    Attributes:
        kind: ``nan``, ``collapse``, ``dead experts`` or ``slow rate``.
        layers: the names of the layers; for nan also ``the loss``.
        text: a sentence for the user; ``str(alert)`` is the same.
        over: whether the problem ended.
        experts: for each layer the dead or slow experts.
        step: the number of the window that showed it, from 1.
        first: whether no alert of this kind came before, or no end of this kind. Only the first says what to do.
    """

    kind: str  # "nan", "collapse", "dead experts" or "slow rate"
    layers: tuple[str, ...]
    text: str
    over: bool = False
    experts: tuple[tuple[int, ...], ...] = ()  # for each layer the dead or slow ones
    step: int = 0  # the number of the window that showed it, from 1
    first: bool = True  # of its kind in this training

    def __str__(self) -> str:
        return self.text


class _Stretch:
    """A stretch of windows of the layers with the same number of experts, and the problems that they have now."""

    def __init__(self, names: tuple[str, ...], counts: Counts):
        self.names = names
        self.counts = torch.zeros_like(counts)  # since a layer was judged
        self.pushed = torch.zeros_like(counts)  # latest windows in a row in which an expert was above the mean
        rows = torch.zeros(len(names), dtype=torch.float64)
        self.windows, self.last_windows = rows, rows.clone()  # in this stretch, and in the one before
        self.last_violation = torch.full_like(rows, math.nan)
        self.dead, self.slow = torch.zeros(2, *counts.shape, dtype=torch.bool)
        self.collapsed = torch.zeros(len(names), dtype=torch.bool)
        self.num_windows = 0  # since ``_judge``
        self._uncounted: list[Counts] = []  # windows: all at once take fewer operations than each by itself

    def add(self, counts: Counts) -> None:
        self._uncounted.append(counts)
        self.num_windows += 1

    def count(self) -> None:  # never waits for a GPU
        """Brings what is known of the stretch up to its last window."""
        if not self._uncounted:
            return
        device = self._uncounted[-1].device
        windows = torch.stack([counts.to(device) for counts in self._uncounted])
        total = windows.sum(-1, keepdim=True)
        was_called = total > 0  # without a call the row of windows neither grows nor ends
        mean = torch.where(was_called, total // windows.shape[-1], -1)  # rounded down: a whole number is above both
        numbers = torch.arange(1, len(windows) + 1, dtype=torch.int16, device=device)[:, None, None]
        last_end = ((windows <= mean) * numbers).amax(0).long()  # the last window that ended the row; 0: none
        num_called = nn.functional.pad(was_called[..., 0].T.cumsum(-1), (1, 0))  # in the first 0, 1, ... windows
        in_row = (num_called[:, -1:] - num_called).gather(-1, last_end)
        self.pushed = self.pushed.to(device) * (last_end == 0) + in_row
        self.counts = self.counts.to(device) + windows.sum(0)
        self.windows += len(self._uncounted)
        self._uncounted = []

    def state(self) -> dict[str, Any]:
        self.count()
        values = {name: value for name, value in vars(self).items() if name != "_uncounted"}
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        for name, current in self.state().items():
            value = state[name]
            setattr(self, name, value.clone().to(current.device) if isinstance(current, Tensor) else value)


class Alerts:
    """Reports each problem of a training once when it starts and once when it ends.

        alerts = equipoise.Alerts(num_steps=1000)
        ...
        balance.step()
        for alert in alerts.see(balance.load, loss, balance.biases):
            print(alert)

    Loads are added up over a stretch: 20 windows, or more until an even share is 30 assignments. At its end:

    - *collapse*: ``effective_experts`` is at most half of the experts. Ends above 0.6 of them.
    - *dead experts*: an expert got no token in the stretch. Ends when it gets a tenth of an even share.
    - *slow rate*: the busiest expert has more than twice its share, MaxVio is above 3 times what chance gives, and the
      expert was above the mean (so its bias moved down) in each of the last 200 windows (in runs under 800 steps: a
      quarter of the steps, at least 40). No alert if MaxVio falls fast enough from stretch to stretch to be below
      these limits within the remaining steps. Ends when the expert is no longer so busy, or was below the mean.
    - *nan*: the loss or a bias is not finite. Ends after a stretch in which all were finite.

    Loads are pooled, so all ranks get the same alerts; let one of them print. Values on a GPU are read when a stretch
    ends; nan on a CPU is seen at once. The thresholds are ours: no publication has any.

    Args:
        steers: whether biases are moved by a rate; otherwise nothing is slow. You may set it at any time.
        num_steps: of the whole training; decides whether a rate can be in time.
        num_seen: windows of the training so far; ``load_state_dict`` sets it too.
        strategy: what balances, as in ``Balance.strategy``. An alert names it and says what to change. You may set it
            at any time.
    """

    def __init__(
        self, *, steers: bool = True, num_steps: int | None = None, num_seen: int = 0, strategy: str | None = None
    ):
        self.steers, self.num_steps, self.num_seen, self.strategy = steers, num_steps, num_seen, strategy
        self._reported: list[str] = []  # kinds of problems that started or ended
        self._stretches: dict[tuple[str, ...], _Stretch] = {}
        self._bad: dict[tuple[str, ...], Bool[Tensor, " names"]] = {}  # not finite in this stretch
        self._nan: list[str] = []  # not finite now
        self._biases: Mapping[str, Tensor] = {}  # of this window
        self._last_biases: dict[tuple[str, ...], Tensor] = {}  # when their layers were judged last

    def __repr__(self) -> str:
        return f"Alerts(num_seen={self.num_seen}, holding={self.mark or 'none'!r})"

    @property
    def holding(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The problems that exist now: by kind the layers, and for each layer the dead or slow experts."""
        problems: dict[str, dict[str, tuple[int, ...]]] = {"nan": dict.fromkeys(self._nan, ())}
        problems |= {kind: {} for kind in FLAGS}
        for stretch in self._stretches.values():
            for kind, flags in FLAGS.items():
                problems[kind] |= _experts_by_layer(stretch.names, getattr(stretch, flags))
        return {kind: layers for kind, layers in problems.items() if layers}

    @property
    def mark(self) -> str:
        """The problems that exist now, for a progress line: ``3 dead experts, collapse of 2 layers``."""
        words = []
        for kind, layers in self.holding.items():
            num_dead = sum(map(len, layers.values()))
            in_layers = f"{kind} of {len(layers)} layers" if len(layers) > 1 else kind
            words.append(f"{num_dead} dead expert{'s' * (num_dead > 1)}" if kind == "dead experts" else in_layers)
        return ", ".join(words)

    def see(
        self,
        load: Mapping[str, Int[Tensor, " experts"]],
        loss: float | Tensor | None = None,
        biases: Mapping[str, Float[Tensor, " experts"]] | None = None,
    ) -> list[Alert]:
        """Takes the loads of one more window, by layer.

        Args:
            load: by layer, the counts of the window over all ranks: ``Balance.load``, or ``Balance.peek_load()``, which
                does not wait for a GPU.
            loss: of the step, to be watched for nan.
            biases: by layer, to be watched for nan: ``Balance.biases``. Where they do not move, no rate is slow.

        Returns:
            The problems that start or end with this window.
        """
        self.num_seen += 1
        self._biases = biases or {}
        alerts = list(self._check_finite(loss, biases or {}))
        for names, counts in _by_size(load):
            stretch = self._stretches.get(names)
            if stretch is None or stretch.counts.shape != counts.shape:
                stretch = self._stretches[names] = _Stretch(names, counts)
            stretch.add(counts)
            if stretch.num_windows >= PATIENCE:
                alerts += self._judge(stretch)
        alerts = [alert._replace(first=_event(alert) not in self._reported) for alert in alerts]
        self._reported += [event for event in dict.fromkeys(map(_event, alerts)) if event not in self._reported]
        return alerts

    def state_dict(self) -> dict[str, Any]:
        """For a resume that repeats no alert. You can also ``see`` the recorded loads again."""
        return {
            "num_seen": self.num_seen,
            "groups": [stretch.state() for stretch in self._stretches.values()],
            "bad": {names: bad.cpu() for names, bad in self._bad.items()},
            "nan": list(self._nan),
            "reported": list(self._reported),
            "biases": {names: biases.cpu() for names, biases in self._last_biases.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave. Raises ``EquipoiseError`` if ``state`` is something else."""
        try:
            num_seen, nan, bad = int(state["num_seen"]), list(state["nan"]), dict(state["bad"])
            reported = list(state.get("reported", []))  # states of earlier versions have neither
            biases = dict(state.get("biases", {}))
            stretches = {saved["names"]: _Stretch(saved["names"], saved["counts"]) for saved in state["groups"]}
            for saved in state["groups"]:
                stretches[saved["names"]].load(saved)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            is_mapping = isinstance(state, Mapping)
            got = f"one with {', '.join(map(str, state)) or 'nothing'}" if is_mapping else type(state).__name__
            raise EquipoiseError(
                f"the state must be what Alerts.state_dict() gave: got {got}. Load that, or begin without a state."
            ) from None
        self.num_seen, self._nan, self._bad, self._reported, self._stretches = num_seen, nan, bad, reported, stretches
        self._last_biases = biases

    def _check_finite(self, loss: float | Tensor | None, biases: Mapping[str, Tensor]) -> Iterator[Alert]:
        watched = list(_by_size(biases))
        if loss is not None:
            watched.insert(0, (("the loss",), torch.as_tensor(loss).detach().view(1, -1)))
        ends = self.num_seen % PATIENCE == 0
        for names, values in watched:
            is_on_cpu = values.device.type == "cpu"
            was_fine = names not in self._bad and not (ends and self._nan)
            if is_on_cpu and was_fine and math.isfinite(values.sum()):  # a finite sum has finite terms
                continue
            bad_now = ~values.isfinite().all(-1)
            bad = self._bad.get(names)
            bad = self._bad[names] = bad_now if bad is None else bad.to(bad_now.device) | bad_now
            if not ends and (not is_on_cpu or not bool(bad.any())):
                continue
            bad_names = [name for name, is_bad in zip(names, bad.tolist(), strict=True) if is_bad]
            started = [name for name in bad_names if name not in self._nan]
            ended = [name for name in self._nan if ends and name in names and name not in bad_names]
            self._nan = [name for name in self._nan if name not in ended] + started
            if started:
                subjects = ["the loss" if name == "the loss" else f"a bias of {name}" for name in started]
                verb = "is" if len(subjects) == 1 else "are"
                text = f"nan: {_join(subjects)} {verb} not finite. The training diverged: "
                text += "resume from a checkpoint with a lower learning rate."
                yield Alert("nan", tuple(started), text, step=self.num_seen)
            if ended:
                yield Alert("nan", tuple(ended), f"over: nan: {_join(ended)}", over=True, step=self.num_seen)
            if ends:
                del self._bad[names]

    def _judge(self, stretch: _Stretch) -> Iterator[Alert]:
        """At the end of a stretch. Layers with too few assignments continue theirs."""
        stretch.num_windows = 0
        stretch.count()
        counts, pushed = torch.stack([stretch.counts, stretch.pushed]).cpu()  # the only wait for a GPU
        mean = counts.double().mean(-1)
        judged = mean >= MIN_SHARE
        if not bool(judged.any()):
            return
        violation = max_violation(counts)
        yield from self._judge_collapse(stretch, judged, effective_experts(counts))
        dead = (counts == 0) | (stretch.dead & (counts < REVIVED_SHARE * mean[:, None]))
        yield from self._judge_dead(stretch, torch.where(judged[:, None], dead, stretch.dead), mean)
        yield from self._judge_slow(stretch, judged, counts, pushed, violation)
        stretch.last_violation = torch.where(judged, violation, stretch.last_violation)
        stretch.last_windows = torch.where(judged, stretch.windows, stretch.last_windows)
        stretch.windows = torch.where(judged, 0.0, stretch.windows)
        stretch.counts *= ~judged[:, None].to(stretch.counts.device)

    def _have_biases_moved(self, stretch: _Stretch) -> Bool[Tensor, " layers"]:
        """Since the layers were judged last, or from zero. True if they are not known."""
        if not all(name in self._biases for name in stretch.names):
            return torch.ones(len(stretch.names), dtype=torch.bool)
        biases = torch.stack([self._biases[name].detach() for name in stretch.names])
        last = self._last_biases.get(stretch.names)
        self._last_biases[stretch.names] = biases
        return (biases != (0 if last is None else last.to(biases.device))).any(-1)

    def _judge_collapse(self, stretch: _Stretch, judged: Tensor, effective: Tensor) -> Iterator[Alert]:
        num_experts = stretch.counts.shape[-1]
        stays = stretch.collapsed & (effective <= SPREAD_ABOVE * num_experts)
        collapsed = torch.where(judged, (effective <= COLLAPSE_BELOW * num_experts) | stays, stretch.collapsed)
        texts = {
            row: f"{stretch.names[row]} is as uneven as {effective[row]:.1f} of {num_experts} experts used equally"
            for row in _true_rows(collapsed)
        }
        yield from self._changes("collapse", stretch, collapsed, texts)

    def _judge_dead(self, stretch: _Stretch, dead: Tensor, mean: Tensor) -> Iterator[Alert]:
        started = dead & ~stretch.dead
        texts = {
            row: f"{stretch.names[row]}: {_experts(_true_rows(started[row]), dead.shape[-1])} got no token in "
            f"{int(stretch.windows[row])} steps, where an even share is {mean[row]:,.0f}"
            for row in _true_rows(started.any(-1))
        }
        yield from self._changes("dead experts", stretch, dead, texts)

    def _judge_slow(
        self, stretch: _Stretch, judged: Tensor, counts: Counts, pushed: Counts, violation: Tensor
    ) -> Iterator[Alert]:
        floor = sampling_floor(1, 1, counts.shape[-1]) / counts.sum(-1).clamp_min(1).double().sqrt()
        threshold = torch.maximum(3 * floor, torch.full_like(floor, BUSY_VIOLATION))
        busy = judged & (violation > threshold) & self.steers & self._have_biases_moved(stretch).cpu()
        if not bool(busy.any() | stretch.slow.any()):
            return
        busiest = counts.argmax(-1)
        steps_left = None if self.num_steps is None else max(0, self.num_steps - self.num_seen)
        quarter = SLOW_WINDOWS if self.num_steps is None else self.num_steps // 4
        min_pushed = max(2 * PATIENCE, min(SLOW_WINDOWS, quarter))
        num_pushed = pushed.gather(-1, busiest[:, None])[:, 0]
        fall = (stretch.last_violation - violation) / ((stretch.last_windows + stretch.windows) / 2)  # per window
        steps_needed = (violation - threshold) / fall - stretch.windows / 2
        steps_needed = torch.where(fall > 0, steps_needed, math.inf).clamp_min(1)
        starts = busy & (num_pushed >= min_pushed) & fall.isfinite()
        starts &= steps_needed > (-1 if steps_left is None else steps_left)
        stays = busy & (num_pushed >= PATIENCE) & stretch.slow.any(-1)
        slow = nn.functional.one_hot(busiest, stretch.slow.shape[-1]).bool() & (starts | stays)[:, None]
        slow = torch.where(judged[:, None], slow, stretch.slow & self.steers)
        texts = {}
        for row in _true_rows(slow.any(-1)):
            needed = f"at this rate about {steps_needed[row]:,.0f} more steps"
            texts[row] = (
                f"{stretch.names[row]}: {_experts([int(busiest[row])], slow.shape[-1])} has {violation[row] + 1:.1f} "
                f"times its share although its bias moved down in each of the last {int(num_pushed[row])} steps; "
                f"{needed if math.isfinite(steps_needed[row]) else 'no end in sight, MaxVio does not fall'}"
            )
        left = "" if steps_left is None else f" {steps_left:,} {'step is' if steps_left == 1 else 'steps are'} left."
        yield from self._changes("slow rate", stretch, slow, texts, left)

    def _changes(
        self, kind: str, stretch: _Stretch, flags: Bool[Tensor, "layers ..."], texts: dict[int, str], more: str = ""
    ) -> Iterator[Alert]:
        before, now = (x.view(len(flags), -1) for x in (getattr(stretch, FLAGS[kind]), flags))
        if torch.equal(before, now):
            return
        setattr(stretch, FLAGS[kind], flags)
        by_expert = kind == "dead experts"
        started, ended = now & ~before, before & ~now
        if not by_expert:  # a layer is slow once, even if another expert becomes its busiest
            started, ended = now & ~before.any(-1, keepdim=True), before & ~now.any(-1, keepdim=True)
        if layers := _experts_by_layer(stretch.names, started):
            text = f"{kind}: {_layers([texts[row] for row in _true_rows(started.any(-1))])}.{more}"
            if kind not in self._reported:
                text += f" {remedy(kind, self.strategy)}"
            yield Alert(kind, tuple(layers), text, False, tuple(layers.values()), self.num_seen)
        if layers := _experts_by_layer(stretch.names, ended):
            where = [f"{name}: {_experts(ids, ended.shape[-1])}" if by_expert else name for name, ids in layers.items()]
            text = f"over: {kind}: {_layers(where)}"
            yield Alert(kind, tuple(layers), text, True, tuple(layers.values()), self.num_seen)


def _event(alert: Alert) -> str:
    return f"{'over: ' if alert.over else ''}{alert.kind}"


def _by_size(values: Mapping[str, Tensor]) -> Iterable[tuple[tuple[str, ...], Tensor]]:
    """The layers with the same number of experts: their names, and their values stacked ``[layers, experts]``."""
    by_size: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in values.items():
        by_size[value.numel()][name] = value
    for of_size in by_size.values():
        yield tuple(of_size), torch.stack(list(of_size.values())).detach()


def _true_rows(flags: Bool[Tensor, " rows"]) -> list[int]:
    return flags.nonzero()[:, 0].tolist()


def _experts_by_layer(names: Sequence[str], flags: Bool[Tensor, "layers ..."]) -> dict[str, tuple[int, ...]]:
    flags = flags.view(len(names), -1)  # a collapse has one flag per layer and no experts
    by_expert = flags.shape[-1] > 1
    return {names[row]: tuple(_true_rows(flags[row])) if by_expert else () for row in _true_rows(flags.any(-1))}


def _join(words: Sequence[str]) -> str:
    """``0, 6 and 12``; after six words ``and 3 more``."""
    *first, last = words if len(words) <= 6 else [*words[:6], f"{len(words) - 6} more"]
    return f"{', '.join(first)} and {last}" if first else last


def _experts(ids: Sequence[int], num_experts: int) -> str:
    return f"expert{'s' * (len(ids) > 1)} {_join(list(map(str, ids)))} of {num_experts}"


def _layers(texts: list[str]) -> str:
    return "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more layers" if texts[4:] else "")
