"""The bias of every layer: where it is kept, what moves it, and the slots that hold a copy of it.

The balancer that steers keeps the biases, ``Balancer.bias()``: float32, one row per layer. A slot is a tensor in the
model that the router adds to its scores, and holds a copy. Two things keep both equal:

- *Restoring*: after a step, a cast or a move of the model, the bias is written into the slot.
- *Adopting*: after a checkpoint was loaded into the slot, or somebody wrote into it (DDP's broadcast), the slot's value
  becomes the bias. Otherwise the next step would silently overwrite what was loaded. A new bias begins with a state of
  zero; the one that the last step left comes back with its state, as after an evaluation of averaged weights.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from equipoise.balancers import Balancer, LayerStack, LoadBalancingLoss, LossFree
from equipoise.counting.layout import Layout, Statistics
from equipoise.errors import EquipoiseError
from equipoise.routers import MoELayer, Slot
from equipoise.routers.kind import ADDED_SLOT
from equipoise.routers.tapped import tap_of
from equipoise.routing import Routing, score, widest_float
from equipoise.torch_internals import copy_each


class LayerGroup:
    """The layers of one kind, and the balancers prepared for them, whose states are stacked, one row per layer.

    Layers are of one kind if they have the same number of experts, k, score function and selection.
    """

    def __init__(
        self,
        indices: list[int],
        balancers: list[Balancer],
        layers: Sequence[MoELayer],
        layout: Layout,
        fused: bool = False,
    ):
        self.layers = indices  # into the layers of the model
        self.balancers = balancers
        self.losses = [balancer for balancer in balancers if balancer.has_loss]
        with_slopes = [balancer for balancer in self.losses if balancer.has_slopes]
        # Which scores the losses with slopes are linear in: True for those that are divided by their sum.
        self.pooled_masses = tuple({b.normalise for b in with_slopes if b.scope != "sequence"})
        self.sequence_masses = tuple({b.normalise for b in with_slopes if b.scope == "sequence"})
        self.masses = tuple({*self.pooled_masses, *self.sequence_masses})
        in_sequences = [b for b in with_slopes if b.scope == "sequence"]
        # The kernels know the formula of one loss within sequences.
        self.fused = fused and all(isinstance(b, LoadBalancingLoss) for b in in_sequences)
        self.k = layers[0].k
        self._is_softmax = layers[0].kind.score_function == "softmax"
        self.steering = next((balancer for balancer in balancers if balancer.has_bias), None)
        self.has_statistics = any(type(b).statistic is not Balancer.statistic for b in balancers)
        device = slot_value(layers[0]).device  # a balancer's state is there too
        no_load = torch.zeros(len(indices), layers[0].num_experts, dtype=torch.int64, device=device)
        self.with_micro_batch_statistic = [
            number for number, b in enumerate(balancers) if b.micro_batch_statistic(no_load) is not None
        ]
        self.slots = [self._slot(layer) for layer in layers]
        self._block = layout.block(indices)
        self._layout = layout
        self._rows: tuple[int, tuple[Tensor, ...]] = (-1, ())  # the address of the biases, and their rows
        self._remembered: list[Tensor] | None = None  # None: what there is now

    def _slot(self, layer: MoELayer) -> Slot:
        """What steers a layer: the model's own slot, whose value is added to the scores, or one of ours."""
        if layer.slot is None or (self.steering is not None and self.steering.multiplies):
            return Slot(layer.router, ADDED_SLOT)
        return layer.slot

    @property
    def biases(self) -> Float[Tensor, "layers experts"] | None:
        return None if self.steering is None else self.steering.bias()

    @property
    def steering_values(self) -> list[Tensor]:
        """The biases and what moves with them, one row per layer."""
        return [] if self.steering is None else _moved_by_update(self.steering)

    def remember(self) -> None:
        """The biases and what moves with them are now as a step or a loaded state left them."""
        self._remembered = None

    @property
    def remembered(self) -> list[Tensor]:
        """The biases and what moves with them, as the last step or the last loaded state left them."""
        return self.steering_values if self._remembered is None else self._remembered

    def take_over(self, in_slots: Float[Tensor, "rows experts"], rows: slice = slice(None)) -> None:
        """What the slots of these rows hold becomes their bias, where somebody else wrote it.

        A slot that holds the bias or its rounding is ours: nothing happened. If it holds the bias that the last step
        left, somebody put old weights back, and what moves with the bias (a momentum) comes back too. Else it is a new
        bias, and its momentum is 0. A number that is not finite is not adopted. Waits for no GPU.
        """
        if self._remembered is None:  # a copy is needed only now, when they change
            self._remembered = [value.clone() for value in self.steering_values]
        present = [value[rows] for value in self.steering_values]
        remembered = [value[rows] for value in self.remembered]
        in_slots = torch.where(in_slots.abs() < float("inf"), in_slots, present[0])
        is_stored = _is_stored(torch.stack([present[0], remembered[0]]), in_slots)
        is_whole = is_stored.all(-1, keepdim=True)
        is_new = ~is_whole[0]
        comes_back = is_new & is_whole[1]
        new = [torch.where(is_stored[0], present[0], in_slots), *(value * ~is_new for value in present[1:])]
        for value, new_value, old_value in zip(present, new, remembered, strict=True):
            value.copy_(torch.where(comes_back, old_value, new_value))

    def takes_kernels(self, values: Tensor) -> bool:
        """Whether what is computed of a call with these values is computed by kernels."""
        if not self.fused:
            return False
        from equipoise import kernels

        return kernels.can_take(values)

    def divides(self, normalise: bool) -> bool:
        """Whether scores must be divided by their sum: those of a softmax sum to 1."""
        return normalise and not self._is_softmax

    def load(self, vector: Tensor) -> Int[Tensor, "layers experts"]:
        """The loads of the layers. Not a copy, if their loads are adjacent in the vector."""
        if self._block is not None:
            return vector[self._block].view(len(self.layers), -1)
        return torch.stack([self._layout.load(vector, layer) for layer in self.layers])

    def num_tokens(self, vector: Tensor) -> Float[Tensor, " layers"]:
        """The unmasked tokens of the layers, at least 1."""
        num_assignments = self.load(vector).sum(-1).to(widest_float(vector.device))
        return (num_assignments / self.k).clamp_min(1)

    def with_slopes(self, normalise: bool, in_sequences: bool) -> list[Balancer]:
        """The losses that are linear in these scores."""
        of_kind = [b for b in self.losses if b.has_slopes and b.normalise == normalise]
        return [b for b in of_kind if (b.scope == "sequence") == in_sequences]

    def states(self) -> dict[str, Float[Tensor, "layers experts"]]:
        """What the balancers move besides the bias, by the key under which it is saved.

        Keys of balancers that do not steer begin with their name, numbered from the second: ``phi.2.average``.
        """
        states = {} if self.steering is None else dict(self.steering.state())
        names: list[str] = []
        for balancer in self.balancers:
            if balancer is not self.steering:
                name = balancer.name or type(balancer).__name__
                names.append(name)
                prefix = name if names.count(name) == 1 else f"{name}.{names.count(name)}"
                states |= {f"{prefix}.{key}": value for key, value in balancer.state().items()}
        return states

    def plain_slots(self, biases: Float[Tensor, "layers experts"]) -> list[Tensor] | None:
        """The slots' tensors if all are flat buffers with the dtype and the device of the biases; else None."""
        tensors, dtype, device = [], biases.dtype, biases.device
        for holder, name in self.slots:
            tensor = holder._buffers.get(name)
            if type(tensor) is not Tensor or tensor.dtype is not dtype or tensor.device != device:
                return None
            tensors.append(tensor)
        return tensors if tensors[0].dim() == 1 else None

    def write(self, slots: list[Tensor], biases: Float[Tensor, "layers experts"]) -> None:
        """Writes the biases into plain slots, in one operation."""
        if self._rows[0] != biases.data_ptr():
            self._rows = biases.data_ptr(), biases.detach().unbind()
        copy_each(slots, self._rows[1])


class Biases:
    """The layer groups of one attached model, and the biases of their layers."""

    def __init__(
        self,
        layers: Sequence[MoELayer],
        balancers: Sequence[Balancer],
        start: dict[str, Tensor],
        layout: Layout,
        fused: bool = False,
    ):
        self.layers = layers
        self.gathered = [balancer.gathers for balancer in balancers]  # by balancer; see Statistics
        self.groups: list[LayerGroup] = []
        self.group_of: dict[int, tuple[LayerGroup, int]] = {}  # by layer: its group, and its row there
        self._layout = layout
        by_kind: dict[Any, list[int]] = {}
        for index, layer in enumerate(layers):
            kind = (layer.num_experts, layer.k, layer.kind.score_function, layer.kind.selection)
            by_kind.setdefault(kind, []).append(index)
        for (_, k, score_function, selection), indices in by_kind.items():
            prepared = [deepcopy(balancer) for balancer in balancers]
            biases = torch.stack([start[layers[index].name] for index in indices])
            for balancer in prepared:
                balancer.prepare(LayerStack(score_function, k, biases, selection, fused))
            group = LayerGroup(indices, prepared, [layers[index] for index in indices], layout, fused)
            self.groups.append(group)
            self.group_of.update({index: (group, row) for row, index in enumerate(indices)})

    def rate(self, window: int) -> float:
        """The rate of Loss-Free in a window; 0.0 without it."""
        steering = [group.steering for group in self.groups]
        return max((balancer.rate_at(window) for balancer in steering if isinstance(balancer, LossFree)), default=0.0)

    @property
    def steers(self) -> bool:
        """Whether a balancer keeps the biases; otherwise the slots alone hold them."""
        return any(group.steering is not None for group in self.groups)

    def of(self, layer: int) -> Float[Tensor, " experts"]:
        """The bias of a layer. Not a copy, if a balancer keeps it."""
        group, row = self.group_of[layer]
        if group.biases is None:
            return slot_value(self.layers[layer])
        self.adopt_writes(group)
        return group.biases[row]

    def by_name(self) -> dict[str, Float[Tensor, " experts"]]:
        """Copies."""
        by_layer: dict[int, Tensor] = {}
        for group in self.groups:
            if group.biases is None:
                values = [slot_value(self.layers[layer]) for layer in group.layers]
            else:
                self.adopt_writes(group)
                values = list(group.biases.clone().unbind())
            by_layer.update(zip(group.layers, values, strict=True))
        return {layer.name: by_layer[index] for index, layer in enumerate(self.layers)}

    def notes(self, num_steps: int) -> list[str]:
        balancers = [balancer for group in self.groups for balancer in group.balancers]
        return list(dict.fromkeys(note for balancer in balancers for note in balancer.notes(num_steps)))

    # ---- moving ----

    def update(self, vector: Tensor, statistics: Statistics, window: int, applied: bool | Tensor) -> None:
        """Moves the biases by the counts of a closed window, and writes them into the slots.

        If ``applied`` is a tensor, nobody waits for it: where it is false, everything is set back.
        """
        for group in self.groups:
            slots = self.adopt_writes(group)
            load = group.load(vector).clone()  # the window's own counts stay, whatever a balancer does with it
            for number, balancer in enumerate(group.balancers):
                moved = _moved_by_update(balancer) if isinstance(applied, Tensor) else []
                before = [value.clone() for value in moved]
                balancer.update(load, statistics.of(group.layers, number), window)
                for value, value_before in zip(moved, before, strict=True):
                    assert isinstance(applied, Tensor)
                    value.copy_(torch.where(applied.to(value.device).bool(), value, value_before))
            group.remember()
            self._write(group, slots)

    def _write(self, group: LayerGroup, plain_slots: list[Tensor] | None) -> None:
        if group.biases is not None and plain_slots is not None:
            group.write(plain_slots, group.biases)
        elif group.biases is not None:
            for layer in group.layers:
                self.restore(layer)

    # ---- restoring ----

    def restore(self, layer: int) -> None:
        """Writes the bias of ``layer`` into its slot, in float32, after a cast, a move or a step."""
        group, row = self.group_of[layer]
        for balancer in group.balancers:
            for value in () if balancer is group.steering else balancer.state().values():
                device = slot_value(self.layers[layer]).device
                if value.device.type != device.type:
                    value.data = value.data.to(device)
        biases, slot = group.biases, group.slots[row]
        in_slot = None if group.steering is None else slot.bias
        if group.steering is None or biases is None or in_slot is None or in_slot.device.type == "meta":
            return
        if in_slot.device != biases.device:
            for value in (*group.steering_values, *group.remembered):
                value.data = value.data.to(in_slot.device)
        if in_slot.dtype == biases.dtype:
            in_slot.copy_(biases[row])
        else:
            slot.replace(biases[row])

    # ---- adopting ----

    def adopt_writes(self, group: LayerGroup) -> list[Tensor] | None:
        """Adopts in-place writes to a slot (checkpoint load, DDP broadcast) as the new bias. Does not wait for a GPU.

        Returns the slots' tensors if they are plain (see ``LayerGroup.plain_slots``) and no other balancer has a state.
        """
        steering, biases = group.steering, group.biases
        if steering is None or biases is None:
            return None
        plain = tensors = group.plain_slots(biases)
        if tensors is None:
            slots = [slot.bias for slot in group.slots]
            tensors = [slot.float() for slot in slots if slot is not None and slot.device == biases.device]
            if len(tensors) < len(slots):
                return None
        if any(balancer.state() for balancer in group.balancers if balancer is not steering):
            plain = None
        in_slots = torch.stack(tensors)
        if in_slots.device.type != "cpu" or not torch.equal(in_slots, biases):  # on a GPU nobody waits to find out
            group.take_over(in_slots)
        return plain

    def adopt(self, layer: int) -> None:
        """A checkpoint was loaded into the model's slot: its value becomes the bias."""
        group, row = self.group_of[layer]
        biases = group.biases
        if group.steering is None or biases is None or group.slots[row].name == ADDED_SLOT:
            return
        loaded = slot_value(self.layers[layer]).to(biases.device)
        if not loaded.isfinite().all():
            self.restore(layer)
            raise EquipoiseError(
                f"the bias of {self.layers[layer].name} must hold finite numbers: the one that was loaded does not. "
                "The checkpoint is damaged, or its training had diverged; load an earlier one."
            )
        group.take_over(loaded[None], slice(row, row + 1))
        self.restore(layer)

    # ---- statistics ----

    def add_micro_batch_statistics(self, vector: Tensor, statistics: Statistics) -> None:
        """A micro-batch closes: adds what balancers want to know of its load."""
        for group in self.groups:
            for number in group.with_micro_batch_statistic:
                values = group.balancers[number].micro_batch_statistic(group.load(vector))
                assert values is not None  # as when the group was made
                for layer, value in zip(group.layers, values, strict=True):
                    statistics.add(layer, number, value.clone())

    def empty_statistics(self) -> Statistics:
        """The statistics of a window without tokens: zeros, in the order and of the size of every other window's."""
        statistics = Statistics(self.gathered)
        for group in self.groups if any(group.has_statistics for group in self.groups) else []:
            for row, index in enumerate(group.layers):
                layer = self.layers[index]
                logits = slot_value(layer).new_zeros(0, layer.num_experts)
                expert_ids = torch.zeros(0, layer.k, dtype=torch.int64, device=logits.device)
                scores = score(logits, layer.kind.score_function)
                routing = Routing(logits, scores, expert_ids, logits.new_zeros(0, layer.k))
                for number, balancer in enumerate(group.balancers):
                    statistic = balancer.statistic(routing, row)
                    if statistic is not None:
                        statistics.add(index, number, statistic)
        if self.layers:
            vector = self._layout.zeros(slot_value(self.layers[0]).device)
            self.add_micro_batch_statistics(vector, statistics)
        return statistics

    # ---- saving ----

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What the balancers move besides the biases, by key and layer. Copies."""
        state: dict[str, dict[str, Tensor]] = {}
        for index, layer in enumerate(self.layers):
            group, row = self.group_of[index]
            for key, value in group.states().items():
                state.setdefault(key, {})[layer.name] = value[row].clone()
        return state

    def load_state(self, biases: dict[str, Tensor], state: dict[str, dict[str, Tensor]]) -> None:
        """Restores saved biases and states. What only another strategy keeps is left out; what is missing is zero."""
        for index, layer in enumerate(self.layers):
            group, row = self.group_of[index]
            if group.biases is not None:
                group.biases[row].copy_(biases[layer.name])
            for key, value in group.states().items():
                saved = state.get(key)
                value[row].copy_(torch.zeros_like(value[row]) if saved is None else saved[layer.name])
            self.restore(index)
        for group in self.groups:
            group.remember()


def _moved_by_update(balancer: Balancer) -> list[Tensor]:
    bias = balancer.bias()
    return [*([] if bias is None else [bias]), *balancer.state().values()]


def _is_stored(biases: Float[Tensor, "kinds rows experts"], in_slots: Tensor) -> Bool[Tensor, "kinds rows experts"]:
    """Number by number, whether a slot holds the bias or its rounding to 16 bits."""
    is_stored = biases == in_slots
    for dtype in (torch.bfloat16, torch.float16):  # a checkpoint may have rounded our bias
        is_stored |= biases.to(dtype).float() == in_slots
    return is_stored


def slot_value(layer: MoELayer, multiplies: bool = False) -> Float[Tensor, " experts"]:
    """What steers a router now, float32: the value of its slot, or of ours from an earlier attach, or zeros. A copy."""
    router = layer.router
    slot = Slot(router, ADDED_SLOT) if multiplies or layer.slot is None else layer.slot
    bias, tap = slot.bias, tap_of(router)
    if slot.name == ADDED_SLOT and tap is not None and tap.multiplies != multiplies:  # a copy, steered the other way
        bias = None
    if bias is None or bias.device.type == "meta":
        device = layer.device
        return torch.zeros(layer.num_experts, dtype=torch.float32, device="cpu" if device.type == "meta" else device)
    return bias.float().clone()
