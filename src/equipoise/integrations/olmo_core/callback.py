"""The callback for OLMo-core's ``Trainer``.

The train module takes the loss from the model's output, and its callbacks cannot add to it. So a hook of the model's
forward adds the balancing loss to the loss in the output. After each step of the optimizer the callback moves the
biases, before the checkpointer saves.
"""

import logging
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from olmo_core.distributed.utils import get_rank
from olmo_core.train.callbacks import Callback
from olmo_core.train.train_module import TransformerTrainModule
from torch import Tensor, nn

from equipoise.alerts import Alerts
from equipoise.attachment import attach, resolve
from equipoise.balance import Balance
from equipoise.counting.window_metrics import without_constants
from equipoise.errors import EquipoiseError, UsageError

__all__ = ["EquipoiseCallback"]

_log = logging.getLogger("equipoise")
_NOT_TESTED = {"tp_enabled": "tensor", "cp_enabled": "context", "ep_enabled": "expert"}


@dataclass
class EquipoiseCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Balances the mixture-of-experts model that OLMo-core's ``Trainer`` trains.

        trainer_config = trainer_config.with_callback("equipoise", EquipoiseCallback("loss-free:rate=1e-3"))

    Args:
        strategy: a strategy string, as for ``equipoise.attach``.
        mask: the name of the tensor in the batch, ``[instances, sequence]``, that is not 0 for each token that counts.
            By default ``attention_mask`` if the batch has one; else all tokens count.
        fresh: accept a checkpoint that holds no state of this callback. The balancing then begins anew, with the biases
            that the model holds.

    Attributes:
        balance: the ``Balance`` of the model, from the moment on when the trainer is built.

    **Gradient.** Let CE_m be the summed cross-entropy of micro-batch m, N the number of labels in the rank's batch, B_m
    the balancing loss of m (coefficients included), T_m the tokens of m that count, T those of the rank's batch. One
    optimizer step has the gradient of

        mean over ranks of  sum_m (CE_m / N + T_m / T B_m)

    OLMo-core divides the cross-entropy by the labels of the rank, and averages over ranks. The weights of B_m add up to
    1, however many labels are masked: a token loads an expert whether or not its label is in the loss.

    **Steps.** A window is what is counted for one optimizer step. The trainer's dry run, evaluations and skipped steps
    (``steps_to_skip``) are not counted. If a ``SkipStepOptimizer`` skips its step, the window closes and nothing moves.

    **Sequences.** For losses of scope ``sequence`` a new sequence begins where ``doc_lens`` of the batch says so.

    **Logs.** ``Balance.metrics()`` is recorded as ``equipoise/...`` in every ``metrics_collect_interval``-th step. Each
    problem that ``Alerts`` finds is a warning of the logger ``equipoise``, once when it starts and once when it ends.

    **Checkpoints.** The state is in the trainer's state of each checkpoint.

    **Errors.** Raises ``UsageError`` for another train module than ``TransformerTrainModule``, and for tensor, context
    and expert parallelism (not tested); ``EquipoiseError`` as ``attach`` does, and for a checkpoint without a state.
    """

    strategy: str
    mask: str | None = field(default=None, kw_only=True)
    fresh: bool = field(default=False, kw_only=True)

    priority: ClassVar[int] = 2  # before the checkpointer, so that a checkpoint holds the biases of its step

    def __post_init__(self) -> None:
        self._adds_loss = any(balancer.has_loss for balancer in resolve([self.strategy]))
        self.balance: Balance | None = None
        self._alerts = Alerts()
        self._batch: dict[str, Any] = {}  # of this rank, until the first forward of the step
        self._num_tokens: int | None = None  # of them that count; None: the one micro-batch has them all
        self._num_forwards = 0  # of this step
        self._is_dry_run = False
        self._has_loaded_state = False
        self._has_said_labels = False
        self._hooks: list[Any] = []
        self._pause = ExitStack()

    # ---- events, in the order of a training ----

    def post_attach(self) -> None:
        train_module = self.trainer.train_module
        if not isinstance(train_module, TransformerTrainModule):
            raise UsageError(
                f"EquipoiseCallback must have a TransformerTrainModule: got a {type(train_module).__name__}, which has "
                "not been tested. Attach by hand: equipoise.attach, and balance.step() after each step."
            )
        for attribute, name in _NOT_TESTED.items():
            if getattr(train_module, attribute):
                raise UsageError(
                    f"EquipoiseCallback must have data parallelism only: {name} parallelism has not been tested. "
                    "Attach by hand, and say with group=... which ranks hold different tokens."
                )
        model = train_module.model
        self.balance = attach(model, self.strategy, group=train_module.dp_process_group)
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            model.register_forward_hook(self._after_forward),
        ]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.balance is not None
        self.balance.load_state_dict(state_dict["balance"])
        self._alerts.load_state_dict(state_dict["alerts"])
        self._has_loaded_state = True

    def post_checkpoint_loaded(self, path: Any) -> None:
        has_loaded_state, self._has_loaded_state = self._has_loaded_state, False
        if not has_loaded_state and not self.fresh:
            raise EquipoiseError(
                f"a checkpoint must hold the state of the balancing: the trainer loaded none from {path}. It was saved "
                "without EquipoiseCallback or under another name of the callback, or load_trainer_state is off. Begin "
                "with the biases that the model holds: EquipoiseCallback(..., fresh=True)."
            )

    def pre_train(self) -> None:
        assert self.balance is not None
        num_steps = self.trainer.max_steps
        self._alerts.num_steps = num_steps
        if num_steps is not None and get_rank() == 0:
            for note in self.balance.notes(num_steps):
                _log.warning(f"EquipoiseCallback: {note}")
        self._is_dry_run = True  # the trainer runs one batch forward and backward before the first epoch
        self._pause.enter_context(self.balance.paused())

    def pre_epoch(self) -> None:
        self._end_dry_run()

    def pre_step(self, batch: dict[str, Any]) -> None:
        self._num_forwards, self._batch = 0, batch  # another callback may shorten it after this

    def post_train_batch(self) -> None:
        if self.balance is None or not self._num_forwards:  # a step in steps_to_skip
            return
        optimizer = self.trainer.train_module.optim
        applied: bool | Tensor = True
        if hasattr(optimizer, "get_step_factor"):  # a SkipStepOptimizer: 0 if it skipped the step, else 1
            applied = optimizer.get_step_factor() > 0
        self.balance.step(applied=applied)
        self._num_forwards = 0
        self._report()

    def state_dict(self) -> dict[str, Any]:
        assert self.balance is not None
        return {"balance": self.balance.state_dict(), "alerts": self._alerts.state_dict()}

    def close(self) -> None:
        self._end_dry_run()

    # ---- public ----

    def detach(self) -> dict[str, Tensor]:
        """Leaves the model as it was.

        Returns:
            The biases by layer, as ``Balance.detach``; ``{}`` before the trainer is built.
        """
        self._end_dry_run()
        for hook in self._hooks:
            hook.remove()
        biases = {} if self.balance is None else self.balance.detach()
        self.balance, self._hooks = None, []
        return biases

    # ---- the parts of the events ----

    def _end_dry_run(self) -> None:
        self._is_dry_run = False
        self._pause.close()

    def _count_batch(self) -> None:
        batch, self._batch, self._num_tokens = self._batch, {}, None
        if "input_ids" not in batch:  # the train module takes them out of a batch that is one micro-batch
            return
        mask = self._mask_of(batch)
        self._num_tokens = batch["input_ids"].numel() if mask is None else int((mask != 0).sum())

    def _mask_of(self, batch: dict[str, Any]) -> Tensor | None:
        mask: Tensor | None = batch.get(self.mask or "attention_mask")
        if mask is None and self.mask is not None:
            raise UsageError(
                f"mask must name a tensor of the batch: got {self.mask!r}, which is not among {', '.join(batch)}."
            )
        if mask is None and "label_mask" in batch and not self._has_said_labels:
            self._has_said_labels = True
            _log.warning(
                "EquipoiseCallback: the batch has a label_mask and no attention_mask, so all tokens count, also those "
                "without a label. If label_mask marks padding, pass mask='label_mask'."
            )
        return mask

    def _counts(self, model: nn.Module) -> bool:
        return model.training and torch.is_grad_enabled() and not self._is_dry_run and self.balance is not None

    def _before_forward(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self._counts(model):
            return
        assert self.balance is not None
        self._num_forwards += 1
        if self._num_forwards == 1:
            self._count_batch()
        mask, lengths = self._mask_of(kwargs), kwargs.get("doc_lens")
        if mask is not None or lengths is not None:
            ids = args[0] if args else kwargs["input_ids"]
            sequence_ids = None if lengths is None else _sequence_ids(lengths, ids.shape[1])
            self.balance.token_mask(None if mask is None else mask != 0, sequence_ids)

    def _after_forward(self, model: nn.Module, args: Any, output: Any) -> Any:
        if not self._counts(model):
            return None
        assert self.balance is not None
        loss = self.balance.loss()  # closes the micro-batch, if it has no loss too
        if not self._adds_loss:
            return None
        if not hasattr(output, "loss"):
            raise EquipoiseError(
                f"a model must return its loss in training: got {type(output).__name__} without one. It was called "
                "without labels, so the balancing loss would be lost."
            )
        if self._num_tokens is not None:
            loss = self.balance.num_tokens / max(self._num_tokens, 1) * loss
        return output._replace(loss=output.loss + loss)

    def _report(self) -> None:
        assert self.balance is not None
        self._alerts.steers, self._alerts.strategy = self.balance.rate > 0, self.balance.strategy
        for alert in self._alerts.see(self.balance.peek_load()):
            if get_rank() == 0:
                _log.warning(f"EquipoiseCallback, step {self.step}: {alert}")
        if self.step == 1 or self.step % self.trainer.metrics_collect_interval == 0:  # reading them waits for a GPU
            for name, value in without_constants(self.balance.metrics()).items():
                self.trainer.record_metric(name, value, namespace="equipoise")


def _sequence_ids(lengths: Tensor, length: int) -> Tensor:
    """A number for each token that changes where a document begins, of the lengths of documents [instances, most]."""
    ends = lengths.cumsum(-1)
    return (torch.arange(length, device=lengths.device)[:, None] >= ends[:, None]).sum(-1)
