"""The callback for ``transformers.Trainer``.

No event lets a callback add to the loss. So ``compute_loss`` of the Trainer is wrapped while it trains: the balancing
loss is added to what it returns. After each step of the optimizer the callback moves the biases.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from equipoise.alerts import Alerts
from equipoise.attachment import base_model, resolve, unwrap
from equipoise.balance import Balance
from equipoise.balancers import Balancer, format_strategy
from equipoise.counting.window_metrics import without_constants
from equipoise.errors import UsageError
from equipoise.integrations.arguments import check_attach_arguments
from equipoise.integrations.trainer.attaching import attach_for_training
from equipoise.integrations.trainer.checkpoints import STATE_FILE, load_missing_weights, load_state, save_state
from equipoise.integrations.trainer.checks import (
    check_called_by_trainer,
    check_model_adds_no_loss,
    check_only_callback,
    check_trainer_adds_no_loss,
    check_training_arguments,
    forget_callback,
    refuse_model_loss,
    remember_callback,
)
from equipoise.integrations.trainer.hooks import ForwardHook, unwrap_save_pretrained, wrap_save_pretrained
from equipoise.integrations.trainer.loss import BalancedLoss
from equipoise.integrations.trainer.stack import find_calling_trainer
from equipoise.model_loss import watch_model_loss
from equipoise.saved import write_biases
from equipoise.torch_internals import is_compiled, step_was_applied

__all__ = ["EquipoiseCallback", "STATE_FILE"]

_log = logging.getLogger("equipoise")


class EquipoiseCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Balances the mixture-of-experts model that a ``transformers.Trainer`` trains, or a trainer of TRL.

        callback = EquipoiseCallback("loss-free:rate=1e-3", LoadBalancingLoss(1e-4))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])

    Args:
        strategy: balancers or strategy strings, as for ``equipoise.attach``.
        add_loss: whether to add the balancing loss to what the Trainer's ``compute_loss`` returns. With False you add
            ``callback.balance.loss()`` in a ``compute_loss`` of your own, with the weight that you choose. If you
            forget it, the backward raises.
        with_model_loss: accept a model that adds a load-balancing loss of its own. Both then act. Otherwise it is
            refused: when the training begins, if the config says so, or in the first backward that it has a part in.
        move_frozen: move the biases even if no router is trained, as with adapters on a frozen base. By default they
            stay fixed then. Losses act either way: they reach the weights in front of the routers.
        fresh: accept a checkpoint that was saved without this callback. Biases then begin with what the model holds.
        attach_arguments: ``where``, ``group``, ``biases``, ``fused`` and ``allow_empty`` of ``equipoise.attach``.

    Attributes:
        balance: the ``Balance`` of the model, from the beginning of the training on; None before.

    **What counts.** The forwards with gradients inside one call of ``compute_loss`` are a micro-batch. Rollouts, and
    log-probabilities of a reference or an older policy, have no gradients: they are not counted.

    **Gradient.** Let CE_m be the mean cross-entropy of micro-batch m over its n_m label tokens, and B_m its balancing
    loss, coefficients included. An optimizer step over micro-batches m has the gradient of:

    - ``sum_m n_m / N (CE_m + B_m)``, if the Trainer passes ``num_items_in_batch`` and the loss divides by it, as causal
      losses of Transformers and ``SFTTrainer`` do. N is that number. Label tokens are the labels that are not -100,
      shifted as the loss shifts them. With ``average_tokens_across_devices`` (the default) N and the sum cover all
      ranks: DDP divides by the number of ranks, so the Trainer multiplies by it. Without it N is of one rank, and the
      ranks' gradients are averaged.
    - ``sum_m (CE_m + B_m)``, if the Trainer passes it and the loss does not use it, as in classifiers of Transformers:
      the Trainer does not divide then either.
    - ``mean_m (L_m + B_m)`` otherwise, also for a loss L_m that is not a cross-entropy (DPO, GRPO, reward models): over
      the micro-batches of the step (fewer in a short last one) and the ranks.

    The first training step shows which it is: there the number is watched. If the loss reads it as a plain number
    (``item()``), that cannot be known, and raises ``UsageError``. If a ``compute_loss`` of your own multiplies the
    model's loss, the balancing loss is multiplied too. If it makes its loss from logits, divides by N and forgets the
    factor of the ranks, the balancing loss has that factor all the same.

    **Steps.** A window is what is counted for one optimizer step. The biases move after every ``optimizer.step()``. If
    a GradScaler skipped that step, the window closes and nothing moves. Micro-batches that an iterable dataset leaves
    over at the end of an epoch belong to the first step of the next one: the Trainer keeps their gradients until then.
    After the last epoch they move nothing. An evaluation counts nothing and has no
    balancing loss. If a callback of yours generates or probes in training mode, its tokens count, unless it does so in
    ``callback.balance.paused()``.

    **Packed rows.** For losses of scope ``sequence``, a new sequence begins where the arguments of the forward show
    one: see ``Balance.token_mask``.

    **Logs.** The logged loss includes the balancing loss; the outputs that ``compute_loss`` returns do not.
    ``Balance.metrics()`` of the last window is logged as ``equipoise/...``. Each problem that ``Alerts`` finds is a
    warning of the logger ``equipoise``, once when it starts and once when it ends. ``equipoise/alerts`` is the number
    of problems that exist, each counted in every layer that has it.

    **Checkpoints.** Every checkpoint holds ``equipoise_balance.pt``. Resuming and ``load_best_model_at_end`` load it.
    So does what ``model.save_pretrained`` saves between two micro-batches, without those that were counted since.
    They also load the experts, which the Trainer of Transformers 5.23 does not (#48805). Biases are not always among
    the weights that are saved: families without a slot (a tensor for them), multiplicative biases, adapters. Then
    ``save_pretrained`` and ``save_model`` write ``equipoise_biases.safetensors`` beside the weights, for
    ``attach(model, "frozen", biases=FOLDER)``; under rule ``multiplicative`` for ``"frozen:multiplies=true"``.

    **After the training** the model stays attached: an evaluation routes as the training did. ``detach()`` ends that.

    **Errors.** Raises ``EquipoiseError`` when the training begins: for a second callback on the same model, for a
    balancing loss beside one of the model's own (``router_aux_loss_coef`` of TRL), for ``nn.DataParallel``, and the
    sequence parallelism of DeepSpeed (not tested).
    """

    def __init__(
        self,
        *strategy: Balancer | str,
        add_loss: bool = True,
        with_model_loss: bool = False,
        move_frozen: bool = False,
        fresh: bool = False,
        **attach_arguments: Any,
    ):
        if not strategy:
            raise UsageError(
                "EquipoiseCallback must have a strategy, as EquipoiseCallback('loss-free'): got none. The strategy "
                "'none' only counts."
            )
        check_attach_arguments("EquipoiseCallback", attach_arguments)
        self._strategy, self._attach_arguments = strategy, attach_arguments
        self._balancers = resolve(strategy)
        self._has_bias = any(balancer.has_bias for balancer in self._balancers)
        self._adds_loss = add_loss and any(balancer.has_loss for balancer in self._balancers)
        self._with_model_loss, self._move_frozen, self._fresh = with_model_loss, move_frozen, fresh
        self.balance: Balance | None = None
        self._model: nn.Module | None = None  # the attached model: inside the adapters, if there are any
        self._saved_model: nn.Module | None = None  # what the Trainer saves
        self._loss: BalancedLoss | None = None
        self._hooks: list[Any] = []
        self._alerts = Alerts()
        self._is_training = False
        self._step_was_applied: bool | Tensor = True  # as the optimizer itself says
        self._needs_biases_file = False  # whether the weights do not hold the biases
        self._saved_in: Path | None = None  # the folder of the checkpoint that is being saved

    def __repr__(self) -> str:
        balance = "not attached" if self.balance is None else repr(self.balance)
        return f"EquipoiseCallback({format_strategy(self._balancers)!r}, balance={balance})"

    # ---- events ----

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        trainer, checkpoint = find_calling_trainer()
        if checkpoint is None and state.global_step:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved_model = unwrap(model)
        inner = base_model(saved_model)
        check_only_callback(inner, self)
        check_training_arguments(args)
        if self._adds_loss:
            check_called_by_trainer(trainer)
        if self._adds_loss and not self._with_model_loss:
            check_trainer_adds_no_loss(trainer)
            check_model_adds_no_loss(inner)
        earlier_state, arguments = self._end_earlier_training(inner)
        self.balance = attach_for_training(inner, self._strategy, arguments, self._move_frozen)
        self._alerts = Alerts(num_steps=state.max_steps, num_seen=state.global_step)
        self._model, self._saved_model, self._is_training = inner, saved_model, True
        remember_callback(inner, self)
        lacks_slot = any(layer.kind.slot is None for layer in self.balance.layers)
        multiplies = any(balancer.multiplies for balancer in self._balancers)
        self._needs_biases_file = self._has_bias and (lacks_slot or multiplies or saved_model is not inner)
        if trainer is not None:
            is_in_graphs = args.torch_compile or is_compiled(model)
            self._loss = BalancedLoss(trainer, inner, self.balance, self._adds_loss, is_in_graphs)
        self._add_hooks(inner, optimizer)
        wrap_save_pretrained(saved_model, self._save)
        try:
            if checkpoint is not None:
                self._load(checkpoint)
            elif earlier_state is not None:
                self.balance.load_state_dict(earlier_state)
        except BaseException:
            if earlier_state is None:  # so that another callback may take this model
                self.detach()
            raise
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        if self in callbacks:  # first, so that every reporter gets our metrics too
            callbacks.remove(self)
            callbacks.insert(0, self)
        if state.is_world_process_zero:
            for note in self.balance.notes(state.max_steps):
                _log.warning(f"EquipoiseCallback: {note}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.balance is not None:
            was_applied, self._step_was_applied = self._step_was_applied, True
            was_skipped = getattr(optimizer, "step_was_skipped", False)  # an AcceleratedOptimizer says it
            self.balance.step(applied=False if was_skipped else was_applied)
            self._report_alerts(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.balance is None or not self._is_training or "loss" not in (logs or {}):
            return
        metrics = {f"equipoise/{name}": value for name, value in without_constants(self.balance.metrics()).items()}
        metrics["equipoise/alerts"] = float(sum(map(len, self._alerts.holding.values())))
        logs.update(metrics)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:  # written before this event
            state.log_history[-1].update(metrics)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        # A sharded checkpoint (FSDP) is saved without save_pretrained.
        if args.should_save and folder.is_dir() and self._saved_in != folder.resolve():
            self._save(folder)
        self._saved_in = None  # an earlier training may have left this folder

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.balance is not None and self.balance.has_open_window:  # an iterable dataset ended within a step
            self.balance.step(applied=False)
        if self.balance is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load(Path(state.best_model_checkpoint))
        self._stop()

    # ---- public ----

    def detach(self) -> dict[str, Tensor]:
        """Leaves the model as it was.

        Returns:
            The biases by layer, as ``Balance.detach``; ``{}`` before a training.
        """
        biases = {} if self.balance is None else self.balance.detach()
        self._stop()
        for hook in self._hooks:
            hook.remove()
        if self._saved_model is not None:
            unwrap_save_pretrained(self._saved_model)
        if self._model is not None:
            forget_callback(self._model)
        self.balance = self._model = self._saved_model = self._loss = None
        self._hooks = []
        return biases

    # ---- the parts of the events ----

    def _end_earlier_training(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        """Detaches what an earlier ``train()`` attached.

        Returns its state, if the training goes on with the same model, and the arguments to attach with.
        """
        if self.balance is None:
            return None, {**self._attach_arguments}
        is_same_model = model is self._model
        state = self.balance.state_dict() if is_same_model else None
        biases = self.detach()
        return state, self._attach_arguments | ({"biases": biases} if is_same_model and self._has_bias else {})

    def _add_hooks(self, model: nn.Module, optimizer: Any) -> None:
        self._hooks = []
        if self._adds_loss and not self._with_model_loss:  # before the hook of attach, which would only warn
            self._hooks += watch_model_loss(model, refuse_model_loss, ForwardHook, prepend=True)
        self._step_was_applied, optimizer = True, getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
        if isinstance(optimizer, torch.optim.Optimizer):
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._step_was_applied = step_was_applied(optimizer)

    def _report_alerts(self, state: Any) -> None:
        """Warns of each problem that starts or ends with the window that was just closed."""
        assert self.balance is not None
        self._alerts.steers, self._alerts.strategy = self.balance.rate > 0, self.balance.strategy
        loss = None if self._loss is None else self._loss.take_loss()
        for alert in self._alerts.see(self.balance.peek_load(), loss):
            if state.is_world_process_zero:
                _log.warning(f"EquipoiseCallback, step {alert.step}: {alert}")

    def _save(self, folder: Path) -> None:
        """Saves what the weights in ``folder`` do not hold."""
        if self.balance is None:
            return
        if self._needs_biases_file:
            write_biases(folder, self.balance.biases, self.balance.multiplies)
        if self._is_training:
            save_state(folder, self.balance, self._alerts)
            self._saved_in = folder.resolve()

    def _load(self, checkpoint: Path) -> None:
        """Loads what the Trainer did not load from a checkpoint."""
        assert self.balance is not None
        load_missing_weights(self._saved_model, checkpoint)
        load_state(checkpoint, self.balance, self._alerts, may_be_missing=self._fresh)

    def _stop(self) -> None:
        self._is_training = False
        if self._loss is not None:
            self._loss.remove()
