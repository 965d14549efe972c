"""The balancing of one model: the public face of what ``attach`` made."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from equipoise._text import abbreviate, shape_or_type
from equipoise.balancers import Balancer, format_strategy
from equipoise.counting.gradient import LossScale
from equipoise.counting.notices import Notices
from equipoise.counting.pool import Pool
from equipoise.counting.recorder import Recorder
from equipoise.counting.replay import Record, Recording
from equipoise.counting.state import load_state, state_of
from equipoise.counting.taps import Taps
from equipoise.counting.window_metrics import window_metrics
from equipoise.errors import EquipoiseError
from equipoise.routers import MoELayer
from equipoise.routers.forward import TokenMask
from equipoise.saved import LayerBiases, check_saved_model, holds_adapter, write_biases
from equipoise.torch_internals import after_each_step, outside_graphs

__all__ = ["Balance"]

_UNUSED_MASK = (
    "token_mask() must be called before the forward that it belongs to: it was called, and no forward followed before "
    "loss() or step()."
)
_NOT_CALLED = (
    "attached routers must be called in training mode, with gradients, between two steps: none was.{} Call step() "
    "once per optimizer step, after a forward (follow(optimizer) calls it already). If forwards without gradients "
    "count, run them in `with balance.counting():`. If a copy took a router's place since, as when adapters of PEFT "
    "that train it in full are added or switched, attach again."
)
_LOST = (
    "an attached router must keep the class that attach gave it: the class of {} was set back since, so its calls are "
    "neither counted nor steered. Call detach() before what was on a router at attach is removed (as by "
    "remove_parametrizations), and attach again after."
)
_log = logging.getLogger("equipoise")


class Balance:
    """The balancing of one model; made by ``attach``.

    Per micro-batch ``loss = model(...).loss + balance.loss()``; after each optimizer step ``balance.step()``.

    A *micro-batch* is what is counted between two ``loss()``, a *window* what is counted between two ``step()``.

    Attributes:
        layers: the attached layers, in model order.
        strategy: the strategy string.
        multiplies: whether a bias b is a factor 1 + b on the scores (rule ``multiplicative``).
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[MoELayer],
        balancers: Sequence[Balancer],
        pool: Pool,
        start: dict[str, Tensor],
        fused: bool = False,
    ):
        self.layers = tuple(layers)
        self.strategy = format_strategy(balancers)
        self.multiplies = any(balancer.multiplies for balancer in balancers)
        self._pool = pool
        self._recorder = Recorder(model, self.layers, balancers, pool, start, fused)
        self._window, self._biases = self._recorder.window, self._recorder.biases
        self._context, self._losses = self._recorder.context, self._recorder.losses
        self._notices = Notices(self._recorder)
        self._taps = Taps(self._recorder)
        self._followed: list[Any] = []  # handles of follow()
        self._has_config = hasattr(model, "save_pretrained")

    # ---- the training loop ----

    def loss(self) -> Float[Tensor, ""]:
        """Closes the micro-batch and returns its balancing loss: add it to the loss of its forward, or forwards.

            loss = sum over balancers of coefficient * sum over layers of the balancer's loss

        A balancer's loss is a mean over the unmasked tokens of the micro-batch, so weight it as you would a mean
        cross-entropy. It is 0 if no balancer has a loss or nothing was counted.

        Its value is for logging, by the counts known when it is made. Its backward records the factor that the loss was
        given (1 / accumulation steps, a GradScaler's scale). Each router then adds the gradient, by the counts known
        when its own backward runs. Counts are constants to autograd, also in a second derivative.

        If a gradient is taken for some tensors only (``backward(inputs=...)``), or from outputs that were cached
        (GradCache), set ``loss_scale`` instead. Then every forward is a micro-batch.

        Returns:
            A scalar: the ticket by which the backward finds the factor.

        Raises:
            EquipoiseError: a mask was set with ``token_mask``, and no forward followed.
        """
        return self._close_micro_batch()

    @outside_graphs
    def _close_micro_batch(self) -> Tensor:
        if self.layers and self._context.has_unused_mask:
            raise EquipoiseError(_UNUSED_MASK)
        self._recorder.settle()
        micro_batch = self._window.close_micro_batch()
        if self._context.has_explicit_mask:
            self._context.clear()
        if micro_batch is None:  # a loss() for logging, between two windows
            for reason in self._recorder.uncounted:
                self._notices.say_uncounted(reason)
            return torch.zeros((), device=self._recorder.device)
        self._notices.check_forwards(micro_batch.num_forwards)
        return self._losses.ticket(micro_batch)

    @property
    def loss_scale(self) -> LossScale | None:
        """The factor of the losses where ``loss()`` cannot be added to a loss; None, the default, where it is added.

        Set it on a pipeline stage, for ``torch.autograd.grad`` and for GradCache. Every forward is then a micro-batch.

        It may be a function of the unmasked tokens of a micro-batch on this rank, an int64 scalar. It is called once
        for each micro-batch, when the first backward of its routers begins: for a scale that changes from step to step,
        or a loss that is a sum over tokens.
        """
        return self._losses.loss_scale

    @loss_scale.setter
    def loss_scale(self, value: LossScale | None) -> None:
        self._losses.loss_scale = value

    @torch.no_grad()
    def step(self, applied: bool | Tensor = True) -> None:
        """Closes the window: pools its counts over the ranks and moves the biases. Call it after ``optimizer.step()``.

        Under Accelerate's ``accumulate`` call it only ``if accelerator.sync_gradients``, or ``follow`` the optimizer.

        Args:
            applied: whether the optimizer's step was applied, a bool or a 0-d tensor (a GradScaler skips steps). The
                window closes either way; the biases move only if it was applied on every rank.

        Raises:
            EquipoiseError: a rank called no router at all, counted another number of micro-batches, or measures while
                others step, then on all ranks; a router lost the class that ``attach`` gave it; torch.distributed was
                initialised after ``attach``; or the ``Balance`` was detached.
            ValueError: ``applied`` is something else.

        A router that no rank called keeps its bias (but for what is left of a momentum). Warns once of each router that
        this rank did not call, or that the loss gave no gradient. Collective over the group.
        """
        applied = _checked(applied, self._recorder)
        self._pool.check_no_rank_joined()
        self._check_attached("step()")
        if not self.layers:  # a pipeline stage of dense layers
            self._window.close_empty()
            self._context.clear()
            return
        called_layers, lost_layers = self._window.called_layers, self._taps.lost_layers()
        if lost_layers or not called_layers:
            self._window.fail(self._recorder.device, self._biases.empty_statistics())
            uncounted = "".join(f" They were called {reason}." for reason in sorted(self._recorder.uncounted))
            message = _LOST.format(abbreviate(lost_layers)) if lost_layers else _NOT_CALLED.format(uncounted)
            raise EquipoiseError(message)
        self._notices.give(called_layers)
        if self._context.has_unused_mask:
            _log.warning(_UNUSED_MASK)
        self._recorder.close_window(applied, called_layers)

    def follow(self, optimizer: torch.optim.Optimizer) -> Any:
        """Calls ``step()`` after every ``optimizer.step()``.

        If a step is skipped by a GradScaler, or raises, this hook never runs: call ``step(applied=False)``. Fused
        optimizers, which skip by themselves, are detected.

        Args:
            optimizer: the optimizer of torch; if Accelerate or Lightning wraps it, ``optimizer.optimizer``.

        Returns:
            A handle, whose ``remove()`` ends that.

        Raises:
            TypeError: ``optimizer`` is not one of torch.
            UsageError: this ``Balance`` follows it already.
        """
        handle = after_each_step(optimizer, self.step, self)
        self._followed.append(handle)
        return handle

    # ---- what counts ----

    @contextmanager
    def measuring(self) -> Iterator[dict[str, Int[Tensor, " experts"]]]:
        """Counts an evaluation, in any mode, and moves nothing. The open window is untouched.

        Collective over the group: all ranks enter and leave it.

        Yields:
            A dict, filled at the end: by layer, the counts over all ranks, int64 ``[experts]``.

        Raises:
            EquipoiseError: it is open already; a rank did not measure; or the ``Balance`` was detached.
        """
        self._pool.check_no_rank_joined()
        self._check_attached("measuring()")
        load: dict[str, Tensor] = {}
        with self._recorder.measuring(self._recorder.device, load):
            yield load

    def paused(self) -> AbstractContextManager[None]:
        """Counts nothing, for forwards that are not training: a probe with gradients. Biases still steer."""
        return self._recorder.paused()

    def counting(self) -> AbstractContextManager[None]:
        """Counts forwards without gradients too, in training mode: to find biases of a model that is not trained."""
        return self._recorder.counting_all()

    def replay(
        self, expert_ids: Record, mask: Tensor | None = None, moves_bias: bool = False
    ) -> AbstractContextManager[None]:
        """Routes one forward, and its backward, by expert ids that were recorded elsewhere: a rollout engine's.

        The choice is that of the record, whatever the bias. The weights come from the live scores, and gradients reach
        the router through them. What a router counts is what it was given. Enter it once for each forward, in any mode.

        Args:
            expert_ids: by layer name, or a list in the order of ``layers``: ints ``[batch, sequence, k]``, or
                ``[tokens, k]`` in the router's own order; None routes a layer live. Or one tensor
                ``[batch, sequence, layers, k]`` or ``[tokens, layers, k]``. A token with -1 is routed live.
            mask: as of ``token_mask``, which it calls. Padding is routed live and counts nowhere, whatever its ids.
            moves_bias: whether ``step()`` moves biases by a window in which this was counted. By default it moves none
                on any rank: the load is not the router's own. A schedule goes on; a momentum stays.

        Raises:
            ValueError: the ids are not a record of these layers. Values on a GPU are not looked at.
            EquipoiseError: this ``Balance`` was detached; a router with ids cannot be replayed; later, if a forward
                or a recomputation does not fit the ids.

        Source: R3, arXiv:2510.11370.
        """
        self._check_attached("replay()")
        return self._recorder.replays.replaying(expert_ids, mask, moves_bias)

    def recording(self) -> AbstractContextManager[Recording]:
        """Records the choice of every router call, in any mode, but for recomputations.

        Yields:
            A dict, by layer name: a list of ``[tokens, k]``, one for each call. Its ``by_layer()`` and ``by_token()``
            lay it out for ``replay``.
        """
        return self._recorder.replays.recording()

    def token_mask(
        self, mask: Tensor | None, sequence_ids: Tensor | None = None, *, where: Callable[[str], bool] | None = None
    ) -> None:
        """Says which tokens of the coming micro-batch count, and which sequence each is in.

        Holds until the next ``loss()`` or ``step()``; for one forward if no ``loss()`` separates micro-batches, and a
        second one raises. Outranks an ``attention_mask`` that the model is called with. Inside ``measuring()`` and
        ``paused()`` it is put aside; one that is set there ends with them. If several kinds of tokens go through one
        model (text, images), give each kind its own mask with ``where``.

        Args:
            mask: 1 for a token that counts, 0 for padding; ``[batch, sequence]`` or flat. None: all count. Of a 2-D
                mask that is longer than what a router sees (a cached prefix, multi-token prediction) the end is taken.
                A block that is computed in tiles, one after the other, has the mask of its tiles (not if compiled).
            sequence_ids: an integer that changes where a new packed sequence begins; the same shape. None: as the
                forward shows it (``position_ids``, ``cu_seq_lens_q``, ``seq_idx``, an ``attention_mask`` that numbers
                segments or shows blocks), else rows.
            where: ``where(layer_name) -> bool`` chooses the layers. None: all layers that have no mask of their own.

        Raises:
            ValueError: a tensor has another shape, a mask on a CPU has other values, or ``where`` chooses no layer.
                Values on a GPU are not looked at: there every number but 0 counts.
        """
        token_mask = TokenMask(mask, sequence_ids)
        token_mask.check()
        chosen = None if where is None else [i for i, layer in enumerate(self.layers) if where(layer.name)]
        if chosen == []:
            names = abbreviate(layer.name for layer in self.layers)
            raise ValueError(f"where must choose a layer: it chooses none of {names}.")
        self._context.set_mask(token_mask, chosen)

    # ---- what comes out ----

    @property
    def load(self) -> dict[str, Int[Tensor, " experts"]]:
        """By layer, the counts of the last closed window over all ranks, int64 ``[experts]``; 0 before the first.

        A copy. Waits for a GPU.
        """
        self._window.exchange.read()
        return self.peek_load() or self._recorder.by_name(self._recorder.layout.zeros(self._recorder.device))

    def peek_load(self) -> dict[str, Int[Tensor, " experts"]]:
        """As ``load``, but does not wait for a GPU, nor check whether a rank failed. ``{}`` before the first window."""
        last = self._window.last
        return {} if last is None else self._recorder.by_name(last.vector.clone())

    @property
    def biases(self) -> dict[str, Float[Tensor, " experts"]]:
        """By layer, the biases, float32 ``[experts]``. A copy.

        A bias is added to what the router ranks, its scores or its logits. If ``multiplies``, the choice is by
        ``score * (1 + bias)``.

        Without a balancer that has a bias: what the model's slots hold, 0 for a layer without one.
        """
        return LayerBiases(self._biases.by_name(), self.multiplies)

    @property
    def num_tokens(self) -> Int[Tensor, ""]:
        """The unmasked tokens of the open micro-batch on this rank, or of the last one; an int64 scalar."""
        return self._window.num_tokens(self._recorder.device)

    @property
    def num_windows(self) -> int:
        """How many windows were closed."""
        return self._window.num_closed

    @property
    def has_open_window(self) -> bool:
        """Whether anything was counted since the last ``step()``."""
        return bool(self._window.micro_batches)

    @property
    def has_loss(self) -> bool:
        """Whether a balancer has a loss. Without one, ``loss()`` is always 0."""
        return self._losses.num_losses > 0

    @property
    def rate(self) -> float:
        """The rate of Loss-Free in the window that was closed last, or in the first one; 0.0 without Loss-Free."""
        return self._biases.rate(max(self.num_windows - 1, 0))

    def metrics(self) -> dict[str, float]:
        """Figures of the last closed window over all ranks, as Python numbers; ``{}`` before the first.

        Waits for a GPU.

        ``maxvio_batch``, ``maxvio_micro``, ``maxvio_floor``, ``min_violation``, ``coefficient_of_variation``,
        ``load_entropy``, ``dead_experts``, ``tokens``, each loss without its coefficient (``load_balancing_loss``,
        ``z_loss``; a second one of the same name with its scope, ``load_balancing_loss_sequence``), ``bias_max``,
        ``collectives``, ``collective_bytes``. docs/reference/metrics.md defines each.
        """
        self._window.exchange.read()
        return window_metrics(self._recorder)

    def notes(self, num_steps: int) -> list[str]:
        """What a user should know before a run of this many steps, a sentence each.

        Args:
            num_steps: optimizer steps of the whole run.
        """
        return self._biases.notes(num_steps)

    # ---- saving ----

    def save_biases(self, folder: str | os.PathLike[str]) -> Path | None:
        """Saves the biases beside weights that were saved into ``folder``.

        Call it after ``model.save_pretrained(folder)``, on the first rank. A family with a slot has them among its
        weights, so nothing is written. Else it writes ``equipoise_biases.safetensors``, in float32, and names it in
        config.json, where ``attach`` finds it. Plain Transformers routes without. Beside an adapter of PEFT, saved
        without the model's weights, they are written for every family: give ``attach(biases=folder)``.

        Args:
            folder: where the model was saved.

        Returns:
            The path of the file, or None if nothing was written.

        Raises:
            UsageError: ``folder`` does not exist; or biases are to be written beside a model with a config, and it
                holds none.
            EquipoiseError: safetensors is not installed.
        """
        folder = Path(folder)
        lacks_slot = self.multiplies or any(layer.slot is None for layer in self.layers)
        is_wanted = self._biases.steers and (lacks_slot or holds_adapter(folder))
        check_saved_model(folder, needs_config=is_wanted and self._has_config)
        return write_biases(folder, self.biases, self.multiplies) if is_wanted else None

    def state_dict(self) -> dict[str, Any]:
        """Biases, what moves with them, and the last window's counts: equal on all ranks.

        No collective, so any rank may call it at any time. What the open window has counted stays there, and is left
        out: a warning says so once. Call it after ``step()`` to leave nothing out.
        """
        self._window.exchange.read()
        return state_of(self._recorder, self.strategy, self.multiplies, self._recorder.device)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what ``state_dict`` gave. The state of another model is refused before anything moves.

        What only another strategy keeps (a momentum) is left out; what the state lacks begins at zero. Collective over
        the group: every rank loads the same state, whatever number of ranks saved it.

        Args:
            state: what ``state_dict`` gave.

        Raises:
            EquipoiseError: the state is of another model or damaged, differs between ranks, or a window is open; or
                the ``Balance`` was detached.
        """
        self._pool.check_no_rank_joined()
        self._check_attached("load_state_dict()")
        self._window.exchange.read()
        load_state(state, self._recorder, self.strategy, self.multiplies, self._recorder.device, self._pool)

    def agree(self, what: str, value: Any, error: Exception | None = None) -> list[Any]:
        """For integrations: the value of every rank of the group. Collective.

        Args:
            what: what was done, for the message.
            value: of this rank.
            error: what was raised here. Then ``agree`` raises on every rank, saying that ``what`` failed on this one.

        Returns:
            The values, by rank.
        """
        return self._pool.agree(what, value, error)

    def detach(self) -> dict[str, Float[Tensor, " experts"]]:
        """Removes all that ``attach`` and ``follow`` added, nothing that others added since.

        A model's own slot keeps what it holds; without one the biases are gone. On every rank of the group, or none.

        Returns:
            The biases by layer, as ``biases``.
        """
        biases = self.biases
        if not self._taps.are_removed:
            self._taps.remove()
            self._pool.close()
            for followed in self._followed:
                followed.remove()
        return biases

    def _check_attached(self, call: str) -> None:
        if self._taps.are_removed:
            raise EquipoiseError(f"{call} must be called before detach(): this Balance was detached. Attach it again.")

    def __reduce__(self) -> Any:
        raise TypeError(
            "a Balance must be saved as its state: it belongs to its model, and cannot be copied or pickled. Save "
            "balance.state_dict(), and load it into the Balance of the new model."
        )

    def __repr__(self) -> str:
        sizes, number = abbreviate(sorted({layer.num_experts for layer in self.layers})), len(self.layers)
        experts = f" of {sizes} experts" if self.layers else ""
        return f"Balance({self.strategy!r}, {number} layer{'s' * (number != 1)}{experts})"


def _checked(applied: bool | Tensor, recorder: Recorder) -> bool | Tensor:
    if isinstance(applied, bool):
        return applied
    if not isinstance(applied, Tensor) or applied.numel() != 1:
        raise ValueError(f"applied must be true, false or a tensor of one number: got {shape_or_type(applied)}.")
    is_on_host = applied.device.type == "cpu" != recorder.device.type
    return bool(applied) if is_on_host else applied.reshape(())
