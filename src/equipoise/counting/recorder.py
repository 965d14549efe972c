"""What the taps report to: counts each router call once and gives each router the gradient of its losses.

Which tokens, when: a call counts when the router is in training mode, not paused, and no backward is running (then it
is a recomputation). The gradient is computed in the backward, by the counts that are pooled by then.
"""

import sys
from collections.abc import Sequence
from copy import deepcopy
from types import FrameType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise.balancers import Balancer, LayerStack
from equipoise.counting.pool import Pool
from equipoise.counting.window import Call, MicroBatch, Statistics, Window, fit_mask, number_sequences
from equipoise.errors import EquipoiseError
from equipoise.load import Layout
from equipoise.routers.forward import ForwardContext
from equipoise.routers.tap import OWN_SLOT, RECOMPUTED, UNCOUNTED, RouterKind, Slot
from equipoise.routing import Routing, score, score_backward, without_autocast

__all__ = ["Group", "Layer", "Recorder", "slot_of"]

FURTHER = 1  # tokens that are predicted beyond the next one


class Layer(NamedTuple):
    """One attached router."""

    name: str
    router: nn.Module
    kind: RouterKind
    num_experts: int
    k: int
    slot: Slot | None  # of its family


class Group:
    """The layers with the same number of experts, k and gate, and the balancers prepared for them, states stacked."""

    def __init__(self, layers: list[int], balancers: list[Balancer], routers: Sequence[Layer], layout: Layout):
        self.layers = layers
        self.balancers = balancers
        self.losses = [balancer for balancer in balancers if balancer.has_loss]
        self.steering = next((balancer for balancer in balancers if balancer.has_bias), None)
        self.has_statistics = any(type(b).statistic is not Balancer.statistic for b in balancers)
        device = slot_of(routers[0]).device  # a balancer's state is there too
        none = torch.zeros(len(layers), routers[0].num_experts, dtype=torch.int64, device=device)
        self.of_micro_batches = [i for i, b in enumerate(balancers) if b.micro_batch_statistic(none) is not None]
        self.slots = [self.slot(layer) for layer in routers]
        self.has_own_slot = any(slot.name == OWN_SLOT for slot in self.slots)
        self.block = layout.block(layers)  # of the counts
        self._rows: tuple[int, tuple[Tensor, ...]] = (0, ())  # of the bias, and where it lies

    def states(self) -> dict[str, Float[Tensor, "layers experts"]]:
        """What balancers move besides the bias, by the name that it is saved under. The one with the bias has its
        own names; the others stand behind the balancer's, the second of a kind behind a number too: ``ema.average``,
        ``ema.2.average``."""
        found = {} if self.steering is None else dict(self.steering.state())
        kinds: list[str] = []
        for balancer in self.balancers:
            if balancer is not self.steering:
                kind = balancer.name or type(balancer).__name__
                kinds.append(kind)
                place = kind if kinds.count(kind) == 1 else f"{kind}.{kinds.count(kind)}"
                found |= {f"{place}.{name}": value for name, value in balancer.state().items()}
        return found

    def plain_slots(self, bias: Float[Tensor, "layers experts"]) -> list[Tensor] | None:
        """What the slots hold, not copied, where each is a plain buffer of the bias's dtype and on its device."""
        found, dtype, device = [], bias.dtype, bias.device
        for holder, name in self.slots:
            held = holder._buffers.get(name)
            if type(held) is not Tensor or held.dtype is not dtype or held.device != device:
                return None
            found.append(held)
        return found if found[0].dim() == 1 else None

    def write(self, slots: list[Tensor], bias: Float[Tensor, "layers experts"]) -> None:
        """The bias into plain slots, in one operation."""
        if self._rows[0] != bias.data_ptr():
            self._rows = bias.data_ptr(), bias.detach().unbind()
        torch._foreach_copy_(slots, self._rows[1])

    def slot(self, layer: Layer) -> Slot:
        """What steers ``layer``: the family's own slot, which is added to the scores, or one of ours."""
        if layer.slot is None or (self.steering is not None and self.steering.multiplies):
            return Slot(layer.router, OWN_SLOT)
        return layer.slot


class Recorder:
    """The counts of one attached model, its balancers' states, and what its taps ask for."""

    def __init__(self, layers: list[Layer], balancers: Sequence[Balancer], pool: Pool, biases: dict[str, Tensor]):
        self.layers = layers
        self.layout = Layout([layer.num_experts for layer in layers])
        self.groups, self.group_of = _make_groups(layers, balancers, biases, self.layout)
        self.num_losses = sum(balancer.has_loss for balancer in balancers)
        self.needs_sequences = any(balancer.has_loss and balancer.scope == "sequence" for balancer in balancers)
        pools_each = any(b.has_loss and b.scope == "global_batch" and b.pooling == "window" for b in balancers)
        gathered = [balancer.gathers for balancer in balancers]
        self.window = Window(self.layout, pool, self.num_losses, pools_each, gathered, self._close_statistics)
        self.last: Tensor | None = None  # pooled counts of the last closed window
        self.loss_scale: float | Tensor | None = None
        self.has_tickets = False  # loss() was called: it separates micro-batches
        self.paused = False
        self.measuring = False
        self.measured: Tensor | None = None  # counts since measuring began
        self.context: ForwardContext | None = None
        # layers that the attention_mask was not of: its shape, and their number of tokens
        self.not_masked: dict[int, tuple[tuple[int, ...], int]] = {}
        self.inferring = False  # the last forward was one by which a pipeline finds out its shapes

    def observe(
        self,
        layer: int,
        weights: Float[Tensor, "tokens k"],
        logits: Float[Tensor, "tokens experts"],
        expert_ids: Int[Tensor, "tokens k"],
        mask: Tensor | None,
        sequence_ids: Tensor | None,
        rows: int,
        training: bool,
    ) -> int:
        recomputing = torch._C._current_graph_task_id() != -1  # the one place that asks: a backward is running
        if not recomputing:
            self.inferring = _infers_shapes()
        if self.inferring:
            return UNCOUNTED
        if recomputing:
            if not training or self.measuring or self.paused:
                return UNCOUNTED
            self._check_recomputation(layer)
            return RECOMPUTED
        if self.paused or (not self.measuring and not training):
            return UNCOUNTED
        num_tokens = expert_ids.shape[0]
        self._check_sizes(self.layers[layer], logits.shape[-1], None if self.measuring else expert_ids.shape[-1])
        own = None if self.context is None else self.context.of_layers.get(layer)
        if own is not None:
            mask, sequence_ids = own
            of_its_own = [len(one) for one in own if one is not None and one.dim() == 2]
            rows = of_its_own[0] if of_its_own else rows
        elif mask is not None and self.context is not None and not self.context.given:
            self._check_padding(self.context)
            if not _is_of_these(mask, num_tokens):
                self.not_masked.setdefault(layer, (tuple(mask.shape), num_tokens))
                mask = None
        mask = fit_mask(mask, num_tokens, rows, self.layers[layer].name, expert_ids.device)
        if self.measuring:
            if self.measured is None:
                self.measured = self.layout.zeros(expert_ids.device)
            self.layout.count(self.measured, layer, expert_ids, mask)
            return UNCOUNTED
        window = self.window
        if self.num_losses == 0 or self.loss_scale is not None:
            self._split_by_forward(layer)
        micro_batch = window.micro_batch(expert_ids.device)
        if not window.calls:  # once a window: what statistics count is told apart by the bias
            for each in self.groups:
                if each.has_statistics:
                    self.adopt_writes(each)
        self.layout.count(micro_batch.vector, layer, expert_ids, mask)
        segments, num_sequences = None, 0
        if self.needs_sequences:
            segments, num_sequences = number_sequences(sequence_ids, rows, num_tokens, expert_ids.device)
        counted = num_tokens if mask is None else mask.sum()
        wants_gradient = num_tokens > 0 and logits.requires_grad
        call = Call(layer, micro_batch, mask, segments, num_sequences, counted, wants_gradient)
        group, row = self.group_of[layer]
        if self.num_losses or group.has_statistics:
            routing = self._routing(layer, call, logits, expert_ids, weights)
            for index, balancer in enumerate(group.balancers):
                statistic = balancer.statistic(routing, row)
                if statistic is not None:
                    micro_batch.statistics.add(layer, index, statistic)
            for index, balancer in enumerate(group.losses):
                value = balancer.loss(routing, self._scope_load(balancer, layer, micro_batch))
                micro_batch.losses[index, layer].add_(value * call.num_tokens)
                micro_batch.dtype = torch.promote_types(micro_batch.dtype, value.dtype)
        return window.record(call, expert_ids)

    @staticmethod
    def _check_padding(context: ForwardContext) -> None:
        if context.no_padding is not None:
            raise EquipoiseError(
                "an attention_mask of two dimensions must say which tokens are padding: of the one that the model was "
                f"called with, {context.no_padding}. Say which tokens count before the forward: "
                "balance.token_mask(mask), token_mask(None) where all do, token_mask(mask, where=...) for some layers."
            )

    @staticmethod
    def _check_sizes(layer: Layer, num_experts: int, k: int | None) -> None:
        """An evaluation may choose another number."""
        k = layer.k if k is None else k
        if (num_experts, k) != (layer.num_experts, layer.k):
            raise EquipoiseError(
                f"a router must route as it did when it was attached: {layer.name} chose {layer.k} of "
                f"{layer.num_experts} experts then, and {k} of {num_experts} now. Call detach() before a model is "
                "changed, and attach it again after."
            )

    def _check_recomputation(self, layer: int) -> None:
        """A layer that the window has not counted yet was counted in one before: its bias has moved since."""
        steering, window = self.group_of[layer][0].steering, self.window
        if steering is not None and window.number > 0 and not any(layer in m.calls for m in window.micro_batches):
            raise EquipoiseError(
                f"a backward must run before step() closes its window: {self.layers[layer].name} is recomputed after, "
                "by other biases than its forward had. Call balance.step() after the optimizer's step; run the "
                "backward of a forward in paused() or measuring() there too."
            )

    def _close_statistics(self, vector: Tensor, statistics: Statistics) -> None:
        """A micro-batch closes: what balancers want to know of its load."""
        for group in self.groups:
            for index in group.of_micro_batches:
                found = group.balancers[index].micro_batch_statistic(self.load_of(group, vector))
                assert found is not None  # as it was when the group was made
                for layer, value in zip(group.layers, found, strict=True):
                    statistics.add(layer, index, value.clone())

    def unreached(self) -> list[int]:
        """Layers whose loss had a backward that did not come to them, though their logits are differentiated. Within a
        compiled graph nobody can tell."""
        calls = self.window.calls
        left = (
            (layer, m.unserved[layer]) for m in self.window.micro_batches if m.factor is not None for layer in m.calls
        )
        return sorted({layer for layer, numbers in left if any(calls[number].wants_gradient for number in numbers)})

    def empty_statistics(self) -> Statistics:
        """The statistics of a window without tokens: zeros, in the order and of the size of every other window's."""
        statistics = Statistics(self.window.gathered)
        for group in self.groups if any(group.has_statistics for group in self.groups) else []:
            for row, index in enumerate(group.layers):
                layer = self.layers[index]
                logits = slot_of(layer).new_zeros(0, layer.num_experts)
                expert_ids = torch.zeros(0, layer.k, dtype=torch.int64, device=logits.device)
                scores = score(logits, layer.kind.score_function)
                routing = Routing(logits, scores, expert_ids, logits.new_zeros(0, layer.k), None, None, 0)
                for number, balancer in enumerate(group.balancers):
                    found = balancer.statistic(routing, row)
                    if found is not None:
                        statistics.add(index, number, found)
        if self.layers:
            self._close_statistics(self.layout.zeros(slot_of(self.layers[0]).device), statistics)
        return statistics

    def load_of(self, group: Group, vector: Tensor) -> Int[Tensor, "layers experts"]:
        """A copy."""
        if group.block is not None:
            return vector[group.block].view(len(group.layers), -1).clone()
        return torch.stack([self.layout.load(vector, layer) for layer in group.layers])

    @property
    def num_calls(self) -> int:
        return len(self.window.calls)

    def forward_failed(self, num_calls: int) -> None:
        """A forward raised: the micro-batch that it had begun to count is dropped."""
        micro_batch = self.window.current
        if micro_batch is not None and len(self.window.calls) > num_calls:
            self.window.micro_batches.remove(micro_batch)
            self.window.current = None

    def _split_by_forward(self, layer: int) -> None:
        """Where no ticket separates micro-batches, one begins when the layer that came first comes again."""
        micro_batch = self.window.current
        if micro_batch is not None and not self.has_tickets and layer == micro_batch.first_layer:
            self.window.close_micro_batch()

    def gradient(
        self,
        layer: int,
        token: int,
        logits: Float[Tensor, "tokens experts"],
        expert_ids: Int[Tensor, "tokens k"],
        weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens experts"]:
        if token == UNCOUNTED:
            return torch.zeros_like(logits)
        call, factor = self._serve(layer, token, expert_ids)
        micro_batch = call.micro_batch
        if micro_batch is self.window.current or not self.has_tickets:  # no loss() closed it: loss_scale stands in
            self.window.close_micro_batch()
        if len(micro_batch.calls[layer]) > 1:  # the loss is a mean over all tokens of the micro-batch
            factor = factor * call.num_tokens / micro_batch.vector[self.layout.tokens][layer].clamp_min(1)
        logits = logits.detach()
        routing = self._routing(layer, call, logits, expert_ids, weights)
        of_scores, others = None, []
        for balancer in self.group_of[layer][0].losses:
            pooled = None
            if balancer.scope == "global_batch" and balancer.pooling == "window":
                pooled = self.window.load_pooled()
            load = self._scope_load(balancer, layer, micro_batch, pooled)
            with without_autocast(logits.device):  # somebody's backward may run under it
                known = balancer.score_gradient(routing, load, balancer.coefficient * factor)
            if known is None:
                others.append((balancer, load))
            else:
                of_scores = known if of_scores is None else of_scores + known
        gradient = None
        if of_scores is not None:
            gradient = score_backward(of_scores, logits, routing.scores, self.layers[layer].kind.score_function)
        if others:
            logits.requires_grad_()
            with torch.enable_grad():
                routing = self._routing(layer, call, logits, expert_ids, weights)
                total = torch.zeros((), dtype=routing.scores.dtype, device=logits.device)
                for balancer, load in others:
                    total = total + balancer.coefficient * balancer.loss(routing, load)
            (found,) = torch.autograd.grad(total, logits, grad_outputs=torch.ones_like(total) * factor)
            gradient = found if gradient is None else gradient + found
        assert gradient is not None  # without a loss nothing asks
        return gradient

    def _serve(self, layer: int, token: int, expert_ids: Tensor) -> tuple[Call, Tensor | float]:
        """The counted call that this backward belongs to, and the factor of its loss."""
        window = self.window
        number, call = -1, None
        if token == RECOMPUTED:  # a recomputed call does not know its micro-batch: the ticket that ran last says it
            micro_batch = window.serving
            if micro_batch is None and self.loss_scale is not None:
                open_ones = [m for m in window.micro_batches if m.unserved.get(layer)]
                micro_batch = max(open_ones, key=lambda m: m.alike(layer, expert_ids), default=None)
            if micro_batch is not None and micro_batch.unserved.get(layer):
                number = micro_batch.find(layer, expert_ids)
                call = window.calls[number]
        else:
            number, call = window.call(token)
        factor = self.loss_scale
        if call is not None and call.micro_batch.factor is not None:
            factor = call.micro_batch.factor
            if number not in call.micro_batch.unserved[layer]:
                factor = None  # served already: this backward has no ticket of its own
        if call is None or factor is None:
            raise EquipoiseError(
                "balance.loss() must be added to the loss of every micro-batch, between its forward and its backward: "
                f"the backward of {self.layers[layer].name} found none. Write `loss = model(...).loss + "
                "balance.loss()`; one before the forward, or a second one after it, is 0 and does nothing. Where that "
                "cannot be done, or the gradient is taken for some tensors only (torch.autograd.grad, "
                "backward(inputs=...)), set balance.loss_scale to the factor of the loss. A forward that raises drops "
                "its micro-batch, with what was counted in it before."
            )
        if number in call.micro_batch.unserved[layer]:
            call.micro_batch.unserved[layer].remove(number)
            call.micro_batch.choices.pop(number, None)
        return call, factor

    def _routing(self, layer: int, call: Call, logits: Tensor, expert_ids: Tensor, weights: Tensor) -> Routing:
        scores = score(logits, self.layers[layer].kind.score_function)
        return Routing(logits, scores, expert_ids, weights, call.mask, call.sequence_ids, call.num_sequences)

    def _scope_load(
        self, balancer: Balancer, layer: int, micro_batch: MicroBatch, pooled: Tensor | None = None
    ) -> Int[Tensor, " experts"] | None:
        """What a loss goes by: in a backward the pooled counts, in a forward those known by then."""
        if balancer.scope in ("sequence", "token"):
            return None
        if balancer.scope == "micro_batch":
            return self.layout.load(micro_batch.vector, layer)
        if balancer.pooling == "window":
            return self.window.load_now(layer) if pooled is None else self.layout.load(pooled, layer)
        if self.last is None:  # before the first window ends: an even share
            return micro_batch.vector.new_ones(self.layers[layer].num_experts)
        return self.layout.load(self.last, layer)

    def restore_bias(self, layer: int) -> None:
        """Writes the bias of ``layer`` into its slot, in float32, after a cast, a move or a step."""
        group, row = self.group_of[layer]
        for balancer in group.balancers:
            for kept in () if balancer is group.steering else balancer.state().values():
                device = slot_of(self.layers[layer]).device
                if kept.device.type != device.type:
                    kept.data = kept.data.to(device)
        if group.steering is None:
            return
        slot, bias = group.slot(self.layers[layer]), group.steering.bias()
        held = slot.bias
        if held is None:
            return
        if held.device != bias.device and held.device.type != "meta":
            for value in (bias, *group.steering.state().values()):
                value.data = value.data.to(held.device)
        if held.dtype == bias.dtype and held.device == bias.device:
            held.copy_(bias[row])
        elif held.device.type != "meta":
            slot.replace(bias[row])

    def restore_biases(self, group: Group, slots: list[Tensor] | None) -> None:
        """``restore_bias`` of all its layers; in one operation, given their plain slots (see ``adopt_writes``)."""
        bias = None if group.steering is None else group.steering.bias()
        if bias is not None and slots is not None:
            group.write(slots, bias)
            return
        for layer in group.layers:
            self.restore_bias(layer)

    def adopt_writes(self, group: Group) -> list[Tensor] | None:
        """What somebody wrote into the slots of a family in place becomes the bias: a checkpoint that was read into
        the tensors of ``state_dict()``, or came from another rank in DDP's broadcast. Asks nothing of a GPU.

        Returns the slots where all are plain: of the bias's dtype and on its device, as is all that balancers keep.
        """
        bias = None if group.steering is None else group.steering.bias()
        if group.steering is None or bias is None:
            return None
        plain = group.plain_slots(bias)
        found = plain
        if found is None:
            slots = [slot.bias for slot in group.slots]
            found = [slot.float() for slot in slots if slot is not None and slot.device == bias.device]
            if len(found) < len(slots):
                return None
        if any(balancer.state() for balancer in group.balancers if balancer is not group.steering):
            plain = None
        if group.has_own_slot:
            return plain
        held = torch.stack(found)
        if held.device.type != "cpu" or not torch.equal(held, bias):  # on a GPU nobody waits to find out
            same = ~held.isfinite()  # a damaged number is not taken up
            for dtype in (torch.float32, torch.bfloat16, torch.float16):  # ours, perhaps rounded
                same |= bias.to(dtype).float() == held
            bias.copy_(torch.where(same, bias, held))
            for value in group.steering.state().values():
                value *= same.all(-1, keepdim=True)
        return plain

    def adopt_bias(self, layer: int) -> None:
        """A checkpoint was loaded into the family's slot: the bias becomes what it holds."""
        group, row = self.group_of[layer]
        if group.steering is None or group.slot(self.layers[layer]).name == OWN_SLOT:
            return
        held, bias = slot_of(self.layers[layer]), group.steering.bias()[row]
        held = held.to(bias.device)
        if not held.isfinite().all():
            self.restore_bias(layer)
            raise EquipoiseError(
                f"the bias of {self.layers[layer].name} must hold finite numbers: the one that was loaded does not. "
                "The checkpoint is damaged, or its training had diverged; load an earlier one."
            )
        if any(torch.equal(bias.to(dtype).float(), held) for dtype in (torch.float32, torch.bfloat16, torch.float16)):
            self.restore_bias(layer)  # the checkpoint holds ours, perhaps rounded
        else:
            bias.copy_(held)
            for value in group.steering.state().values():
                value[row].zero_()
            self.restore_bias(layer)


def _is_of_these(mask: Tensor, num_tokens: int) -> bool:
    """Whether a mask that was found can be that of so many tokens: of all, or of rows one shorter, which a layer that
    predicts a token further is given."""
    rows, length = mask.shape
    return num_tokens % max(rows, 1) == 0 and 0 <= length - num_tokens // max(rows, 1) <= FURTHER


def _infers_shapes() -> bool:
    """Whether this forward is one that ``torch.distributed.pipelining`` runs on uninitialised data, before the first
    step of a stage that was not given its ``input_args``, to find out the shapes of what it sends and receives."""
    if "torch.distributed.pipelining" not in sys.modules:
        return False
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in ("_forward_metadata_inference", "_shape_inference"):
            return frame.f_globals.get("__name__") == "torch.distributed.pipelining.stage"
        frame = frame.f_back
    return False


def _make_groups(
    layers: list[Layer], balancers: Sequence[Balancer], biases: dict[str, Tensor], layout: Layout
) -> tuple[list[Group], dict[int, tuple[Group, int]]]:
    members: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        members.setdefault((layer.num_experts, layer.k, layer.kind.score_function, layer.kind.selection), []).append(
            index
        )
    groups: list[Group] = []
    group_of: dict[int, tuple[Group, int]] = {}
    for (_, k, score_function, selection), indices in members.items():
        prepared = [deepcopy(balancer) for balancer in balancers]
        start = torch.stack([biases[layers[index].name] for index in indices])
        for balancer in prepared:
            balancer.prepare(LayerStack(score_function, k, start, selection))
        group = Group(indices, prepared, [layers[index] for index in indices], layout)
        groups.append(group)
        group_of.update({index: (group, row) for row, index in enumerate(indices)})
    return groups, group_of


def slot_of(layer: Layer, multiplies: bool = False) -> Float[Tensor, " experts"]:
    """What steers a router now, float32: its family's slot, a slot of ours from an earlier attach, or nothing."""
    router = layer.router
    slot = Slot(router, OWN_SLOT) if multiplies or layer.slot is None else layer.slot
    held = slot.bias
    tap = router.__dict__.get("_equipoise")
    if slot.name == OWN_SLOT and tap is not None and tap.multiplies != multiplies:  # a copy, steered the other way
        held = None
    if held is None or held.device.type == "meta":
        device = next(router.parameters()).device
        return torch.zeros(layer.num_experts, dtype=torch.float32, device="cpu" if device.type == "meta" else device)
    return held.float().clone()
