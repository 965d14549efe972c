"""The callback for ``lightning.Trainer``.

    from equipoise.integrations.lightning import BalanceCallback

    trainer = lightning.Trainer(callbacks=[BalanceCallback("loss-free:rate=1e-3")])

It has another name than ``equipoise.integrations.EquipoiseCallback``, which is for ``transformers.Trainer``: a script
may import both. Seen with Lightning 2.6.6. ``pytorch_lightning`` has other classes of the same names.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from equipoise._text import abbreviate
from equipoise.alerts import Alerts
from equipoise.attachment import attach, resolve
from equipoise.balance import Balance
from equipoise.balancers import Balancer, format_strategy
from equipoise.counting.window_metrics import without_constants
from equipoise.errors import EquipoiseError, UsageError
from equipoise.integrations.arguments import check_attach_arguments
from equipoise.integrations.framework_import import explained
from equipoise.routers.find import find_routers
from equipoise.torch_internals import step_was_applied

with explained("BalanceCallback", "lightning", "lightning", "2.6"):
    from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging

__all__ = ["BalanceCallback"]

_log = logging.getLogger("equipoise")


class BalanceCallback(Callback):
    """Balances the mixture-of-experts model that a ``lightning.Trainer`` trains.

        callback = BalanceCallback("loss-free:rate=1e-3", LoadBalancingLoss(1e-4))
        trainer = lightning.Trainer(callbacks=[callback])

    Args:
        strategy: balancers or strategy strings, as for ``equipoise.attach``.
        module: the path of the model inside the LightningModule, such as ``"student"``. Default: the attribute of the
            LightningModule that holds all routers; the LightningModule itself if there is no such one.
        add_loss: whether to add the balancing loss to what ``training_step`` returns. With False you add
            ``callback.balance.loss()`` yourself. If you forget it, the backward raises.
        fresh: accept a checkpoint that was saved without this callback. Biases then begin with what the model holds.
        attach_arguments: ``where``, ``group``, ``biases``, ``fused`` and ``allow_empty`` of ``equipoise.attach``.

    Attributes:
        balance: the ``Balance`` of the model, from the beginning of a fit on; None before.

    **Gradient.** Let L_m be what ``training_step`` returns for batch m, and B_m its balancing loss, coefficients
    included, a mean over the unmasked tokens of the batch. Lightning divides both by ``accumulate_grad_batches`` = A,
    also in a last window of fewer batches, and averages over R ranks. An optimizer step over batches m has the gradient
    of ``1 / (A R) sum_m (L_m + B_m)``. A batch is a micro-batch, whatever its number of tokens.

    **Steps.** A window is what is counted for one optimizer step. If a GradScaler skipped it, the window closes and
    nothing moves. Nothing moves either for batches that an epoch leaves over without a step. Validation and the sanity
    check count nothing. A batch for which ``training_step`` returns None has no gradient, but its tokens count.

    **Logs.** ``Balance.metrics()`` of the last window is logged as ``equipoise/...``, as often as the Trainer logs,
    and at the end of an epoch. Each problem that ``Alerts`` finds is a warning of the logger ``equipoise``.

    **Checkpoints.** Those of Lightning hold the state of the balancing. ``fit``, ``validate``, ``test`` and ``predict``
    with ``ckpt_path`` load it. What was counted since the last optimizer step is left out, as Lightning leaves out the
    gradients that were accumulated since.

    **After a fit** the model stays attached: an evaluation routes as the training did. ``detach()`` ends that.

    **Manual optimization** works for one optimizer. A strategy with a loss needs ``add_loss=False`` there.

    **Errors.** Raises ``UsageError`` when a fit begins if it has several optimizers, the FSDP or the DeepSpeed
    strategy, or a callback that averages the weights; and for a checkpoint without a state of the balancing. Raises
    ``EquipoiseError`` for an optimizer that calls its closure twice in a step (LBFGS): tokens would count twice.
    """

    def __init__(
        self,
        *strategy: Balancer | str,
        module: str | None = None,
        add_loss: bool = True,
        fresh: bool = False,
        **attach_arguments: Any,
    ):
        if not strategy:
            raise UsageError(
                "BalanceCallback must have a strategy, as BalanceCallback('loss-free'): got none. The strategy 'none' "
                "only counts."
            )
        check_attach_arguments("BalanceCallback", attach_arguments)
        self._strategy, self._path, self._fresh, self._attach_arguments = strategy, module, fresh, attach_arguments
        self._balancers = resolve(strategy)
        self._has_bias = any(balancer.has_bias for balancer in self._balancers)
        self._has_loss = any(balancer.has_loss for balancer in self._balancers)
        self._adds_loss = add_loss
        self.balance: Balance | None = None
        self._model: nn.Module | None = None  # what is attached
        self._alerts = Alerts()
        self._loaded: Mapping[str, Any] | None = None  # of a checkpoint, until there is a Balance to load it into
        self._is_loaded = False  # a checkpoint brought a state, in this run of the Trainer
        self._is_fitting, self._is_first_fit = False, True
        self._num_training_steps = 0  # in the batch that is under way
        self._was_applied: bool | Tensor = False  # whether a step of the optimizer in this batch moved the weights
        self._has_backward = False  # a training step of the open window returned a loss
        self._num_steps = 0  # of the optimizer, up to the last batch
        self._num_windows = 0  # likewise
        self._undo: list[Callable[[], None]] = []

    def __repr__(self) -> str:
        balance = "not attached" if self.balance is None else repr(self.balance)
        return f"BalanceCallback({format_strategy(self._balancers)!r}, balance={balance})"

    # ---- a fit ----

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._is_loaded, self._loaded = False, None
        if stage == "fit":
            _check_trainer(trainer)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        _check_optimizers(trainer, pl_module, self._adds_loss and self._has_loss)
        self._is_first_fit = self.balance is None
        self._attach(pl_module)
        assert self.balance is not None
        self._is_fitting, self._num_steps, self._num_windows = True, trainer.global_step, self.balance.num_windows
        optimizer = trainer.optimizers[0]
        if pl_module.automatic_optimization:
            self._undo.append(optimizer.register_step_post_hook(self._after_step).remove)
            self._wrap_training_step(trainer.strategy)
        else:  # a batch may have several steps
            self._undo.append(self.balance.follow(optimizer).remove)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        try:
            self._check_loaded(trainer)
        except UsageError:
            if self._is_first_fit:  # so that another callback may take this model
                self.detach()
            raise
        assert self.balance is not None
        self._num_steps, self._num_windows = trainer.global_step, self.balance.num_windows
        num_steps = trainer.estimated_stepping_batches
        if 0 < num_steps < float("inf"):
            state = self._alerts.state_dict()
            self._alerts = Alerts(num_steps=int(num_steps), num_seen=trainer.global_step)
            if self._is_loaded:
                self._alerts.load_state_dict(state)
            if trainer.is_global_zero:
                for note in self.balance.notes(int(num_steps)):
                    _log.warning(f"BalanceCallback: {note}")

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._num_training_steps, self._was_applied = 0, False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        balance = self.balance
        assert balance is not None
        if trainer.global_step > self._num_steps and balance.num_windows == self._num_windows:
            # Lightning counts the steps that a GradScaler skips. It lets a single process skip a batch, too.
            if trainer.world_size > 1 or balance.has_open_window:
                balance.step(applied=self._was_applied if self._has_backward else False)
            self._has_backward = False
        self._num_steps = trainer.global_step
        if balance.num_windows == self._num_windows:
            return
        self._num_windows = balance.num_windows
        self._alerts.steers, self._alerts.strategy = balance.rate > 0, balance.strategy
        for alert in self._alerts.see(balance.peek_load(), _loss_of(outputs)):
            if trainer.is_global_zero:
                _log.warning(f"BalanceCallback, step {alert.step}: {alert}")
        is_last = trainer.is_last_batch or trainer.should_stop  # what watches a metric looks at the end of an epoch
        is_logged = is_last or trainer.global_step % max(trainer.log_every_n_steps, 1) == 0
        if is_logged and not trainer.barebones:
            metrics = without_constants(balance.metrics())
            pl_module.log_dict({f"equipoise/{name}": value for name, value in metrics.items()})

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.balance is not None and self.balance.has_open_window:  # Lightning drops the gradients of these batches
            self.balance.step(applied=False)
            self._num_windows = self.balance.num_windows

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_fit()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end_fit()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end_fit()

    # ---- an evaluation outside of a fit ----

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        self._begin_evaluation(trainer, pl_module)

    @torch.inference_mode(False)  # the biases outlive the evaluation
    def _begin_evaluation(self, trainer: Any, pl_module: Any) -> None:
        """Lets the model route with the biases of the checkpoint that is evaluated."""
        if self._is_fitting:
            return
        self._check_loaded(trainer)
        if self._loaded is not None and self._loaded["balance"] is not None and self._has_bias:
            self._attach(pl_module)

    # ---- checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        if self._loaded is not None:  # not attached yet: a finder of learning rates saves and loads before a fit
            return dict(self._loaded)
        state = None if self.balance is None else self.balance.state_dict()
        return {"balance": state, "alerts": self._alerts.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded, self._is_loaded = state_dict, True
        if self._is_fitting:  # a strategy that shards the model loads it late
            self._load()

    def _load(self) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded["balance"] is not None:
            assert self.balance is not None
            self.balance.load_state_dict(loaded["balance"])
            self._alerts.load_state_dict(loaded["alerts"])

    def _check_loaded(self, trainer: Any) -> None:
        """Raises ``UsageError`` if a checkpoint was loaded that has no state of the balancing."""
        if trainer.ckpt_path is not None and not self._is_loaded and not self._fresh and self._has_bias:
            raise UsageError(
                f"a checkpoint must hold the state of BalanceCallback: {trainer.ckpt_path} does not. It was saved "
                "without this callback, or with save_weights_only=True. Save it with both, or begin with the biases "
                "that the model holds: BalanceCallback(..., fresh=True)."
            )

    # ---- public ----

    def detach(self) -> dict[str, Tensor]:
        """Leaves the model as it was.

        Returns:
            The biases by layer, as ``Balance.detach``; ``{}`` before a fit.
        """
        self._end_fit()
        biases = {} if self.balance is None else self.balance.detach()
        self.balance = self._model = None
        return biases

    # ---- the parts of the events ----

    def _attach(self, pl_module: nn.Module) -> None:
        """Attaches the model. One that an earlier fit attached keeps its state, unless a checkpoint brings another."""
        model = _model_in(pl_module, self._path)
        arguments, state = dict(self._attach_arguments), None
        if self.balance is not None:
            if model is self._model:
                state = self.balance.state_dict()
            biases = self.detach()
            if state is not None and self._has_bias:
                arguments["biases"] = biases
        self.balance, self._model = attach(model, *self._strategy, **arguments), model
        if self._loaded is not None:
            self._load()
        elif state is not None:
            self.balance.load_state_dict(state)

    def _wrap_training_step(self, strategy: Any) -> None:
        """Lets the Trainer's strategy return each training step's loss with the balancing loss added."""
        own_training_step = strategy.training_step

        def training_step(*args: Any, **kwargs: Any) -> Any:
            self._num_training_steps += 1
            if self._num_training_steps > 1:
                raise EquipoiseError(
                    "an optimizer must call its closure once in a step: it ran training_step a second time for one "
                    "batch, whose tokens would count twice. Use another optimizer, or manual optimization with "
                    "add_loss=False and balance.paused() around what must not count."
                )
            output = own_training_step(*args, **kwargs)
            self._has_backward |= output is not None
            if not self._adds_loss:
                return output
            assert self.balance is not None
            balancing_loss = self.balance.loss()  # closes the micro-batch
            return _with_loss(output, balancing_loss) if self._has_loss else output

        strategy.training_step = training_step
        self._undo.append(lambda: vars(strategy).pop("training_step", None))

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._was_applied = step_was_applied(optimizer)

    def _end_fit(self) -> None:
        self._is_fitting = False
        while self._undo:
            self._undo.pop()()


def _with_loss(output: Any, balancing_loss: Tensor) -> Any:
    """What ``training_step`` returned, with the balancing loss in its loss."""
    if isinstance(output, Mapping) and isinstance(output.get("loss"), Tensor):
        return {**output, "loss": output["loss"] + balancing_loss.to(output["loss"].device)}
    return output + balancing_loss.to(output.device) if isinstance(output, Tensor) else output


def _loss_of(outputs: Any) -> Tensor | None:
    """The loss in what Lightning passes to ``on_train_batch_end``."""
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    return loss.detach() if isinstance(loss, Tensor) else None


def _model_in(pl_module: nn.Module, path: str | None) -> nn.Module:
    """The model to attach: by its path, or the attribute that holds all routers.

    Not the LightningModule, if that can be. Layers and saved biases then have the names that they have without
    Lightning, and what was saved beside the weights of the model is found.
    """
    if path is not None:
        try:
            return pl_module.get_submodule(path)
        except AttributeError:
            names = abbreviate(name for name, _ in pl_module.named_children())
            raise UsageError(
                f"module must be the path of a module in the LightningModule: got {path!r}, which has {names}."
            ) from None
    layers = find_routers(pl_module, allow_empty=True)
    holders = {layer.name.partition(".")[0] for layer in layers}
    name = next(iter(holders), "")
    if len(holders) == 1 and any(layer.name != name for layer in layers):
        return pl_module.get_submodule(name)
    return pl_module


def _check_trainer(trainer: Any) -> None:
    """Raises ``UsageError`` for strategies and callbacks of Lightning under which the balancing would be wrong."""
    name = type(trainer.strategy).__name__
    if name == "FSDPStrategy":
        raise UsageError(
            "the strategy must keep the weights of each router apart: FSDPStrategy flattens them. Use "
            "ModelParallelStrategy, which is FSDP2, with fully_shard in configure_model."
        )
    if trainer.strategy.handles_gradient_accumulation:  # that of DeepSpeed
        raise UsageError(
            f"Lightning must divide the loss and count the steps itself: {name} does both, and BalanceCallback was "
            "never tested with it. Use DDPStrategy or ModelParallelStrategy, or DeepSpeed without Lightning."
        )
    for callback in trainer.callbacks:
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UsageError(
                f"the weights that are trained must be those that are saved: {type(callback).__name__} averages them, "
                "copies the model before the routers are attached, and has no average of the biases. Leave it out."
            )


def _check_optimizers(trainer: Any, pl_module: Any, adds_loss: bool) -> None:
    """Raises ``UsageError`` if it is not clear which step ends a window, or how the loss is weighed."""
    num_optimizers = len(trainer.optimizers)
    if num_optimizers != 1:
        raise UsageError(
            f"a fit must have one optimizer, whose step moves the biases: got {num_optimizers}. Attach the model "
            "yourself in setup(), and call balance.step() after the step of the optimizer that trains the routers."
        )
    if not isinstance(trainer.optimizers[0], torch.optim.Optimizer):
        raise UsageError(f"the optimizer must be one of torch: got {type(trainer.optimizers[0]).__name__}.")
    if adds_loss and not pl_module.automatic_optimization:
        raise UsageError(
            "Lightning must make the backward: with automatic_optimization=False you do, so it cannot be known how "
            "your loss is weighed. Add callback.balance.loss() to it, before you divide it, and say so with "
            "BalanceCallback(..., add_loss=False); or use a strategy without a loss (loss-free, quantile)."
        )
