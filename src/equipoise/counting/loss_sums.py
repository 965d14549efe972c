"""The losses of one micro-batch: what a forward keeps of them, their values when somebody asks, their slopes.

A balancing loss is linear in the scores p, once the counts are known: ``mean_t sum_e slope_e p_te``. So a forward keeps
its counts and the mass ``sum_t p_te``. The value, ``sum_e slope_e mass_e / N``, is made when it is read, for all layers
at once. So are the slopes, which are the gradient at p. A loss within sequences has a row of each for every sequence.

A loss without slopes is called in the forward, by the counts known then.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from equipoise.balancers import Balancer
from equipoise.counting.biases import LayerGroup
from equipoise.counting.call import CountedCall
from equipoise.routing import Routing, widest_float, without_autocast

Masses = dict[bool, Tensor]  # by whether p is divided by its sum


class Counts(NamedTuple):
    """The counts that the losses of a micro-batch go by."""

    own: Int[Tensor, " numbers"]  # of the micro-batch; see Layout
    pooled: Int[Tensor, " numbers"]  # of its window, as far as they are known
    previous: Int[Tensor, " numbers"] | None  # of the window before; None in the first

    def over_scope(self, balancer: Balancer, group: LayerGroup) -> Int[Tensor, "layers experts"]:
        if balancer.scope == "micro_batch":
            return group.load(self.own)
        if balancer.pooling == "window":
            return group.load(self.pooled)
        if self.previous is None:  # an even share
            return torch.ones_like(group.load(self.own))
        return group.load(self.previous)


def _total(scores: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens 1"]:
    return scores.sum(-1, keepdim=True).clamp_min_(torch.finfo(scores.dtype).tiny)


def _at_scores(
    slope: Float[Tensor, "*tokens experts"], scores: Float[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens experts"]:
    """The gradient at scores that are divided by their sum: ``(slope_e - sum_j p_j slope_j) / sum_j s_j``."""
    total = _total(scores)
    with without_autocast(scores.device):  # the caller's backward may run under autocast
        mean = (scores @ slope)[:, None] if slope.dim() == 1 else (scores * slope).sum(-1, keepdim=True)
    return (slope - mean.div_(total)).div_(total)


class LossSums:
    """What is kept of the losses of one micro-batch."""

    def __init__(self, groups: Sequence[LayerGroup], group_of: dict[int, tuple[LayerGroup, int]]):
        self.groups, self.group_of = groups, group_of
        self.dtype = torch.float32  # of the scores, or wider
        self._masses: dict[tuple[int, bool], Tensor] = {}  # by layer: [parts, experts]
        self._sequence_calls: list[CountedCall] = []  # whose loads by sequence are kept
        self._sequence_masses: dict[int, Masses] = {}  # by number of the call: [sequences, experts]
        self._others: dict[tuple[int, int], Tensor] = {}  # by number of the balancer, and layer: [parts], over tokens
        self._values: Tensor | None = None
        self._slopes: _Slopes | None = None

    # ---- forward ----

    def add(self, call: CountedCall, routing: Routing, load_of_call: Callable[[Balancer], Tensor | None]) -> None:
        """Adds a call. ``load_of_call`` gives a loss without slopes the counts known now."""
        group, _ = self.group_of[call.layer]
        self.dtype = torch.promote_types(self.dtype, routing.scores.dtype)
        if group.takes_kernels(routing.scores):
            self._add_by_kernels(call, routing, group)
        else:
            self._add_masses(call, routing, group)
        for number, balancer in enumerate(group.losses):
            if not balancer.has_slopes:
                value = balancer.loss(routing, load_of_call(balancer))
                assert value is not None  # a balancer in ``losses`` has one
                self.dtype = torch.promote_types(self.dtype, value.dtype)
                self._add(number, call.layer, value.to(widest_float(value.device)) * call.num_tokens)

    def _add_masses(self, call: CountedCall, routing: Routing, group: LayerGroup) -> None:
        by_sequence: Masses = {}
        for normalise in group.masses:
            p = routing.scores
            if group.divides(normalise):
                p = p / _total(p)
            if call.mask is not None:
                p = p.masked_fill(call.mask.masked, 0)  # nan too
            if normalise in group.pooled_masses:
                self._add_mass(call.layer, normalise, p.sum(0, keepdim=True))
            if normalise in group.sequence_masses:
                by_sequence[normalise] = p
        if by_sequence:
            self._add_sequences(call, routing, by_sequence)

    def _add_by_kernels(self, call: CountedCall, routing: Routing, group: LayerGroup) -> None:
        from equipoise import kernels

        scores, is_counted = routing.scores, None if call.mask is None else call.mask.is_counted
        for normalise in group.pooled_masses:
            self._add_mass(call.layer, normalise, kernels.masses(scores, is_counted, group.divides(normalise)))
        for normalise in group.sequence_masses:
            load = call.sequence_load
            if load is None or call.sequences is None:
                load = call.load_by_sequence(routing)  # raises
            assert call.sequences is not None
            value = kernels.values_in_sequences(scores, is_counted, call.sequences.ids, load, group.divides(normalise))
            for number, balancer in enumerate(group.losses):
                if balancer in group.with_slopes(normalise, in_sequences=True):
                    self._add(number, call.layer, value)
        call.sequence_load = None  # too large to be kept

    def _add_mass(self, layer: int, normalise: bool, mass: Float[Tensor, "parts experts"]) -> None:
        key = layer, normalise
        self._masses[key] = torch.cat([self._masses[key], mass]) if key in self._masses else mass

    def _add_sequences(self, call: CountedCall, routing: Routing, p: Masses) -> None:
        load = call.load_by_sequence(routing)
        assert call.sequences is not None
        masses = {normalise: call.sequences.sum(values) for normalise, values in p.items()}
        if not call.sequences.is_bound:
            call.sequence_load = load
            self._sequence_calls.append(call)
            self._sequence_masses[call.number] = masses
        else:  # a row for each sequence that there may be: too large to be kept
            self._add_sequence_values(self.group_of[call.layer][0], [call.layer], load[None], [masses])

    def _add_sequence_values(self, group: LayerGroup, layers: list[int], loads: Tensor, masses: list[Masses]) -> None:
        """``loads``: [calls, sequences, experts]."""
        for number, balancer in enumerate(group.losses):
            if balancer.has_slopes and balancer.scope == "sequence":
                mass = torch.stack([by_kind[balancer.normalise] for by_kind in masses])
                values = (_slopes(balancer, loads) * mass).sum((-2, -1))
                for layer, value in zip(layers, values.unbind(), strict=True):
                    self._add(number, layer, value)

    def _add(self, number: int, layer: int, value: Tensor) -> None:
        key, parts = (number, layer), value.reshape(-1)
        self._others[key] = torch.cat([self._others[key], parts]) if key in self._others else parts

    # ---- values ----

    def values(self, counts: Counts) -> Float[Tensor, "losses layers"]:
        """Each loss of each layer, a mean over its unmasked tokens. Asked for when all calls are there."""
        if self._values is None:
            for group, calls, loads in self.loads_by_sequence():
                masses = [self._sequence_masses[call.number] for call in calls]
                self._add_sequence_values(group, [call.layer for call in calls], loads, masses)
            by_group = {id(group): self._values_of(group, counts) for group in self.groups}
            columns = [by_group[id(group)][:, row] for _, (group, row) in sorted(self.group_of.items())]
            self._values = torch.stack(columns, dim=-1) if len(self.groups) > 1 else by_group[id(self.groups[0])]
            self._masses, self._sequence_masses, self._others = {}, {}, {}
        return self._values

    def _values_of(self, group: LayerGroup, counts: Counts) -> Float[Tensor, "losses layers"]:
        num_tokens = group.num_tokens(counts.own)
        zero = num_tokens.new_zeros(1)
        values = []
        for number, balancer in enumerate(group.losses):
            if balancer.has_slopes and balancer.scope != "sequence":
                slopes = _slopes(balancer, counts.over_scope(balancer, group))
                no_mass = torch.zeros_like(slopes[:1], dtype=self.dtype)
                masses = [self._masses.get((layer, balancer.normalise), no_mass) for layer in group.layers]
                values.append((slopes * _sum_parts(masses)).sum(-1))
            else:
                values.append(_sum_parts([self._others.get((number, layer), zero) for layer in group.layers]))
        return torch.stack(values) / num_tokens

    def loads_by_sequence(self) -> list[tuple[LayerGroup, list[CountedCall], Tensor]]:
        """The calls with loads by sequence, and these [calls, sequences, experts]: by layer group and sequences."""
        by_size: dict[tuple[int, int], list[CountedCall]] = {}
        for call in self._sequence_calls:
            assert call.sequence_load is not None
            group = self.group_of[call.layer][0]
            by_size.setdefault((self.groups.index(group), call.sequence_load.shape[0]), []).append(call)
        return [
            (self.groups[number], calls, torch.stack([c.sequence_load for c in calls if c.sequence_load is not None]))
            for (number, _), calls in by_size.items()
        ]

    # ---- backward ----

    def forget_tokens(self) -> None:
        """No backward will follow."""
        self._slopes = None
        for call in self._sequence_calls:
            call.mask = call.sequences = None
            del call.micro_batch  # it holds these sums: a cycle would stay until Python collects it

    def gradient(
        self, call: CountedCall, routing: Routing, factor: Tensor | float, counts: Counts
    ) -> Float[Tensor, "*tokens experts"] | None:
        """The gradient at the scores of a call of ``factor`` times the losses with slopes; None if there are none."""
        group, _ = self.group_of[call.layer]
        slopes = self._slopes_of(factor, counts)
        gradient: Tensor | None = None
        if group.takes_kernels(routing.scores):
            return self._gradient_by_kernels(call, routing, group, slopes)
        for normalise in group.masses:
            slope = slopes.of(call, routing, group, normalise)
            part = _at_scores(slope, routing.scores) if group.divides(normalise) else slope
            gradient = part if gradient is None else gradient + part
        if gradient is None or call.mask is None:
            return gradient
        if gradient.dim() == 1:
            return call.mask.numbers[:, None] * gradient
        return gradient.masked_fill(call.mask.masked, 0)

    def add_gradient(
        self,
        call: CountedCall,
        routing: Routing,
        factor: Tensor | float,
        counts: Counts,
        onto: Float[Tensor, "tokens experts"],
    ) -> Float[Tensor, "tokens experts"]:
        """The same, added to ``onto``."""
        group, _ = self.group_of[call.layer]
        if group.takes_kernels(routing.scores):
            added = self._gradient_by_kernels(call, routing, group, self._slopes_of(factor, counts), onto)
            return onto if added is None else added
        gradient = self.gradient(call, routing, factor, counts)
        return onto if gradient is None else onto + gradient

    def _gradient_by_kernels(
        self, call: CountedCall, routing: Routing, group: LayerGroup, slopes: "_Slopes", onto: Tensor | None = None
    ) -> Float[Tensor, "tokens experts"] | None:
        from equipoise import kernels

        is_counted = None if call.mask is None else call.mask.is_counted
        ids = None if call.sequences is None else call.sequences.ids
        load = call.count_by_kernel(routing.expert_ids, routing.scores.shape[-1]) if group.sequence_masses else None
        for normalise in group.masses:
            key = call.layer, normalise
            in_sequences = normalise in group.sequence_masses
            onto = kernels.score_gradient(
                routing.scores,
                is_counted,
                group.divides(normalise),
                slopes=slopes.of_layer.get(key),
                sequence_ids=ids if in_sequences else None,
                by_sequence=load if in_sequences else None,
                scale=slopes.in_sequences.get(key),
                onto=onto,
            )
        return onto

    def _slopes_of(self, factor: Tensor | float, counts: Counts) -> "_Slopes":
        """Those of all layers. They are made once, and again when the factor or the pooled counts have changed."""
        if self._slopes is None or not self._slopes.are_of(factor, counts):
            self._slopes = _Slopes(self, factor, counts)
        return self._slopes


class _Slopes:
    """The slopes of all layers of a micro-batch, times the factor, over the tokens."""

    def __init__(self, sums: LossSums, factor: Tensor | float, counts: Counts):
        self.factor, self.pooled, self.dtype = factor, counts.pooled, sums.dtype
        self.by_token: dict[int, Tensor] = {}  # by layer: factor / N
        self.of_layer: dict[tuple[int, bool], Tensor] = {}  # [experts]
        self.of_call: dict[tuple[int, bool], Tensor] = {}  # by number: [sequences, experts]
        self.in_sequences: dict[tuple[int, bool], Tensor] = {}  # by layer: what kernels multiply ``E f_e`` by
        for group in sums.groups:
            by_token = (factor / group.num_tokens(counts.own))[:, None]
            self.by_token.update(zip(group.layers, by_token.unbind(), strict=True))
            for normalise in group.pooled_masses:
                losses = group.with_slopes(normalise, in_sequences=False)
                slopes = [_slopes(b, counts.over_scope(b, group)) * b.coefficient for b in losses]
                rows = (_sum(slopes) * by_token).to(self.dtype).unbind()
                self.of_layer.update(((layer, normalise), row) for layer, row in zip(group.layers, rows, strict=True))
            for normalise in group.sequence_masses if group.fused else ():
                coefficient = sum(b.coefficient for b in group.with_slopes(normalise, in_sequences=True))
                scales = (by_token[:, 0] * coefficient).unbind()
                self.in_sequences.update(((n, normalise), scale) for n, scale in zip(group.layers, scales, strict=True))
        for group, calls, loads in sums.loads_by_sequence():
            by_token = torch.stack([self.by_token[call.layer] for call in calls])[..., None]
            for normalise in group.sequence_masses:
                tables = self._of_sequences(group, normalise, loads, by_token).unbind()
                self.of_call.update(((c.number, normalise), table) for c, table in zip(calls, tables, strict=True))

    def are_of(self, factor: Tensor | float, counts: Counts) -> bool:
        return self.factor is factor and self.pooled is counts.pooled

    def _of_sequences(self, group: LayerGroup, normalise: bool, loads: Tensor, by_token: Tensor) -> Tensor:
        losses = group.with_slopes(normalise, in_sequences=True)
        return (_sum([_slopes(b, loads) * b.coefficient for b in losses]) * by_token).to(self.dtype)

    def of(
        self, call: CountedCall, routing: Routing, group: LayerGroup, normalise: bool
    ) -> Float[Tensor, "*tokens experts"]:
        slopes = [self.of_layer[call.layer, normalise]] if normalise in group.pooled_masses else []
        if normalise in group.sequence_masses:
            table = self.of_call.get((call.number, normalise))
            if table is None:
                load, by_token = call.load_by_sequence(routing), self.by_token[call.layer]
                table = self._of_sequences(group, normalise, load, by_token)
            assert call.sequences is not None
            slopes.append(call.sequences.spread(table))
        return _sum(slopes).to(routing.scores.dtype)


def _slopes(balancer: Balancer, load: Tensor) -> Tensor:
    slopes = balancer.slopes(load)
    assert slopes is not None  # the balancer has slopes
    return slopes


def _sum_parts(values: list[Tensor]) -> Tensor:
    """The sum of each over its first dimension, stacked."""
    if any(value.shape != values[0].shape for value in values):
        return torch.stack([value.sum(0) for value in values])
    stacked = torch.stack(values)
    return stacked.squeeze(1) if stacked.shape[1] == 1 else stacked.sum(1)


def _sum(values: list[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
