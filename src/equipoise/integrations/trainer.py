"""The callback for ``transformers.Trainer``: a loss in the model's output, a step of ours after each other step.

The Trainer takes its loss from the model's output and offers callbacks no other place to add to it, so a forward hook
on the model adds the balancing loss there, weighed as the cross-entropy beside it is.
"""

import inspect
import logging
import sys
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from equipoise.alerts import Alerts
from equipoise.attachment import attach, base_model, resolve, unwrap
from equipoise.balance import Balance
from equipoise.balancers import Balancer, Frozen
from equipoise.errors import EquipoiseError, UsageError
from equipoise.saved import write_biases
from equipoise.torch_internals import step_was_applied

__all__ = ["EquipoiseCallback", "STATE_FILE"]

STATE_FILE = "equipoise_balance.pt"  # in each of the Trainer's checkpoints: Balance.state_dict()
IGNORED = -100  # the label of a token that is no target
_IDLE = ".original_module"  # in PEFT, what modules_to_save copied: kept, and never called

_log = logging.getLogger("equipoise")


class EquipoiseCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Balances the model of a ``transformers.Trainer``.

        callback = EquipoiseCallback(LossFree(rate=1e-3), LoadBalancingLoss(1e-4, scope="sequence"))
        trainer = Trainer(model, args, train_dataset=data, callbacks=[callback])

    Args:
        strategy: balancers or strategy strings, as for ``attach``.
        add_loss: add the balancing loss to the loss in the model's output. False: you add ``callback.balance.loss()``
            in a ``compute_loss`` of your own, weighed as your loss is; where it is forgotten the backward raises.
        with_model_loss: accept that the model adds a load-balancing loss of its own beside ours.
        move_frozen: move biases though no router is trained, as with adapters on a frozen base. By default they stay
            as they are; losses act either way, on what comes before the routers.
        fresh: resume from a checkpoint that was saved without this callback, beginning with the biases that the
            model holds.
        attach_arguments: ``where``, ``group``, ``biases``, ``allow_empty`` of ``attach``.

    Attributes:
        balance: the ``Balance``, from the beginning of the training on; None before.

    **The gradient** of an optimizer step, with CE_m the mean cross-entropy of micro-batch m over its label tokens n_m,
    and B_m its balancing loss, coefficients included:

    - Where the Trainer hands ``num_items_in_batch`` to the model (families of Transformers; N counts the labels that
      are not -100, shifted as the loss shifts them): ``sum_m n_m / N (CE_m + B_m)``. N is of all ranks, and the sum
      goes over all, with ``average_tokens_across_devices`` (the default); the Trainer multiplies by the number of
      ranks what DDP divides by. Without it N is of this rank, and the ranks' gradients are averaged.
    - Where it does not: ``mean_m (CE_m + B_m)``, over the micro-batches of the step, fewer in a short last one, and
      over the ranks.

    The step of the biases follows ``optimizer.step()``; where a GradScaler skipped that, the window closes and nothing
    moves. Evaluation has no balancing loss and counts nothing. The loss that the Trainer logs holds the balancing loss;
    ``Balance.metrics()`` of the last window before stands beside it as ``equipoise/...``. ``Alerts`` are warnings of
    the log, once each; ``equipoise/alerts`` says how many hold, a layer of a kind each.

    Each checkpoint has ``equipoise_balance.pt``, and resuming takes it up, as does ``load_best_model_at_end``; both
    load the experts too, which the Trainer of Transformers 5.23 leaves out (#48805). Biases that the weights do not
    hold (families without a slot; adapters) are written beside whatever ``save_pretrained`` or ``save_model`` saves,
    as ``equipoise_biases.safetensors``, for ``attach(model, "frozen", biases=FOLDER)``.

    A packed row is cut into its sequences, for losses of scope ``sequence``, where its ``position_ids`` begin anew.

    The model stays attached after the training, so that an evaluation routes as it trained; ``detach()`` ends that.
    Micro-batches that an iterable dataset leaves over at the end of an epoch, without a step, are in no window. What a
    callback of yours generates or probes in training mode counts, unless it does so in ``callback.balance.paused()``.

    Raises ``EquipoiseError`` when the training begins, or at its first forward, where it would go on without the
    balancing loss: label smoothing, a ``compute_loss_func``, a ``compute_loss`` that passes the model's loss over. With
    a strategy that has no loss (``loss-free``, ``quantile``) all of these are welcome. Refused too: another callback of
    this kind on the model, ``nn.DataParallel``, DeepSpeed (not tried).
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
                "EquipoiseCallback must be given a strategy, as EquipoiseCallback('loss-free'): got none. 'none' only "
                "counts."
            )
        known = [name for name, p in inspect.signature(attach).parameters.items() if p.kind is p.KEYWORD_ONLY]
        for name in attach_arguments:
            if name not in known:
                raise TypeError(
                    f"an argument of EquipoiseCallback must be one of attach ({', '.join(known)}): got {name}."
                )
        self._strategy = strategy
        self._balancers = resolve(strategy)
        self._arguments = attach_arguments
        self._steers = any(balancer.has_bias for balancer in self._balancers)
        self._adds_loss = add_loss and any(balancer.has_loss for balancer in self._balancers)
        self._with_model_loss, self._move_frozen, self._fresh = with_model_loss, move_frozen, fresh
        self.balance: Balance | None = None
        self._model: nn.Module | None = None  # attached; inside the adapters, if there are any
        self._saved: nn.Module | None = None  # what the Trainer saves
        self._hooks: list[Any] = []
        self._alerts = Alerts()
        self._loss: Tensor | None = None  # of the forwards of the window, summed: for the alerts
        self._training = False
        self._applied: bool | Tensor = True  # the last step of the optimizer, by what it says itself
        self._beside_weights = False  # whether the biases need a file of their own

    # ---- events ----

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trainer, folder = _trainer_that_calls()
        if folder is None and state.global_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        saved = unwrap(model)
        inner = base_model(saved)
        self._check(args, inner, trainer)
        before, arguments = self._let_go(inner)
        if any(_IDLE in name for name, _ in inner.named_modules()):
            arguments |= {"where": partial(_is_used, self._arguments.get("where"))}
        self.balance = self._attach(inner, arguments)
        self._alerts, self._loss = Alerts(num_steps=state.max_steps, num_seen=state.global_step), None
        self._model, self._saved, self._training = inner, saved, True
        without_slot = any(layer.kind.slot is None for layer in self.balance.layers)
        multiplies = any(balancer.multiplies for balancer in self._balancers)
        self._beside_weights = self._steers and (without_slot or multiplies or saved is not inner)
        self._shifts = _shifts_labels(inner)
        self._names = list(inspect.signature(inner.forward).parameters)
        self._hooks = [inner.register_forward_hook(_Hook(self, "_output_with_loss"), with_kwargs=True)]
        if any(balancer.has_loss and balancer.scope == "sequence" for balancer in self._balancers):
            before_forward = _Hook(self, "_tell_sequences")
            self._hooks.append(inner.register_forward_pre_hook(before_forward, with_kwargs=True, prepend=True))
        optimizer = kwargs.get("optimizer")
        self._applied, optimizer = True, getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's
        if isinstance(optimizer, torch.optim.Optimizer):
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        if hasattr(saved, "save_pretrained"):
            saved.__dict__["save_pretrained"] = _SavePretrained(saved, self)
        if folder is not None:
            _load_what_was_left_out(saved, folder)
            self._load(folder)
        elif before is not None:
            self.balance.load_state_dict(before)
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        if self in callbacks:  # first, so that every reporter gets our metrics too
            callbacks.remove(self)
            callbacks.insert(0, self)
        if state.is_world_process_zero:
            for note in self.balance.notes(state.max_steps):
                _log.warning(f"EquipoiseCallback: {note}")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self.balance is not None:
            applied, self._applied = self._applied, True
            self.balance.step(applied=False if getattr(optimizer, "step_was_skipped", False) else applied)
            self._watch(state)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._applied = step_was_applied(optimizer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.balance is not None and self._has_open_window():  # left over: an iterable dataset that ended early
            self.balance.step(applied=False)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.balance is None or not self._training or "loss" not in (logs or {}):
            return
        figures = {f"equipoise/{name}": value for name, value in self.balance.metrics().items()}
        figures["equipoise/alerts"] = float(sum(map(len, self._alerts.holding.values())))
        logs.update(figures)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:  # written before this event
            state.log_history[-1].update(figures)

    def _watch(self, state: Any) -> None:
        """Says what began or is over with the window that was closed."""
        assert self.balance is not None
        self._alerts.steers = self.balance.rate > 0
        loss, self._loss = self._loss, None
        for alert in self._alerts.see(self.balance.peek_load(), loss):
            if state.is_world_process_zero:
                _log.warning(f"EquipoiseCallback, step {alert.step}: {alert}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir() and not (folder / STATE_FILE).exists():  # shards, without the wrapper
            self._save(folder)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.balance is not None and args.load_best_model_at_end and state.best_model_checkpoint is not None:
            _load_what_was_left_out(self._saved, Path(state.best_model_checkpoint))
            self._load(Path(state.best_model_checkpoint))
        self._training = False

    # ---- what a user may ask for ----

    def detach(self) -> dict[str, Tensor]:
        """Leaves the model as it was and returns the biases by layer, as ``Balance.detach``; {} before a training."""
        biases = {} if self.balance is None else self.balance.detach()
        for hook in self._hooks:
            hook.remove()
        if self._saved is not None:
            self._saved.__dict__.pop("save_pretrained", None)
        self.balance = self._model = self._saved = None
        self._hooks, self._training = [], False
        return biases

    # ---- attaching ----

    def _check(self, args: Any, model: nn.Module, trainer: Any) -> None:
        for hook in model._forward_hooks.values():
            if isinstance(hook, _Hook) and hook.callback not in (None, self):
                raise EquipoiseError(
                    "a model must have one EquipoiseCallback: another has attached it already. Give the Trainer one "
                    "that names all mechanisms, as EquipoiseCallback('loss-free', 'lbl'); if the other is of an "
                    "earlier Trainer, call detach() on it and pass what comes back as biases=...."
                )
        if args.n_gpu > 1:
            raise EquipoiseError(
                f"one process must drive one GPU: got {args.n_gpu}, which the Trainer wraps in nn.DataParallel, whose "
                "copies of the model are not balanced. Start with torchrun, or set CUDA_VISIBLE_DEVICES to one."
            )
        if getattr(args, "deepspeed", None):
            raise EquipoiseError(
                "DeepSpeed under the Trainer must not be used with EquipoiseCallback: it has not been tried. Use DDP."
            )
        if not self._adds_loss:
            return
        what = None
        if args.label_smoothing_factor > 0:
            what, first = f"label_smoothing_factor={args.label_smoothing_factor:g}", "Set label_smoothing_factor=0"
        elif getattr(trainer, "compute_loss_func", None) is not None:
            what, first = "compute_loss_func", "Leave it out"
        if what is not None:
            raise UsageError(
                "the Trainer must take its loss from the model's output, where the balancing loss is added: got "
                f"{what}, which computes one from the logits and drops it. {first}; or balance without a loss, by "
                "loss-free or quantile; or add callback.balance.loss() to a compute_loss of your own, and say so by "
                "EquipoiseCallback(..., add_loss=False)."
            )
        config = getattr(model, "config", None)
        coefficient = getattr(config, "router_aux_loss_coef", 0) or 0
        if coefficient and getattr(config, "output_router_logits", False) and not self._with_model_loss:
            raise UsageError(
                "one load-balancing loss must act: the model adds one of its own (output_router_logits with "
                f"router_aux_loss_coef={coefficient:g}) beside that of EquipoiseCallback. Set "
                "model.config.output_router_logits = False, or ask for both with with_model_loss=True."
            )

    def _let_go(self, model: nn.Module) -> tuple[Any, dict[str, Any]]:
        """Detaches what an earlier ``train()`` attached; returns its state, where it can go on with the same model, and
        the arguments to attach with."""
        if self.balance is None:
            return None, {**self._arguments}
        same = model is self._model
        state = self.balance.state_dict() if same and not self._has_open_window() else None  # open: it was interrupted
        biases = self.detach()
        return state, self._arguments | ({"biases": biases} if same and self._steers else {})

    def _attach(self, model: nn.Module, arguments: dict[str, Any]) -> Balance:
        """Attaches the strategy; with biases that stay where no router is trained."""
        balance = attach(model, *self._strategy, **arguments)
        routers = [layer.router for layer in balance.layers]
        moves = any(balancer.has_bias and not isinstance(balancer, Frozen) for balancer in self._balancers)
        if self._move_frozen or not moves or not routers or any(_is_trained(router, model) for router in routers):
            return balance
        balance.detach()
        if any(balancer.multiplies for balancer in self._balancers):
            raise UsageError(
                "biases that multiply must move: got a model whose routers are not trained, where biases stay. Ask "
                "for it with move_frozen=True, or take a rule that adds."
            )
        _log.warning(
            "EquipoiseCallback: no router of the model is trained, so the biases stay as they are. move_frozen=True "
            "moves them; they are then saved beside the adapters."
        )
        return attach(model, *(Frozen() if b.has_bias else b for b in self._balancers), **arguments)

    # ---- the loss ----

    def _tell_sequences(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward: packed sequences of a row, which its ``position_ids`` tell apart."""
        named = dict(zip(self._names, args, strict=False)) | kwargs
        positions, mask = named.get("position_ids"), named.get("attention_mask")
        if not (self._training and model.training and isinstance(positions, Tensor) and positions.dim() == 2):
            return
        assert self.balance is not None
        ids = named.get("input_ids")
        if positions.shape[0] == 1 and isinstance(ids, Tensor):
            positions = positions.expand(ids.shape[0], -1)  # as a model broadcasts them
        given = mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None
        place = torch.arange(positions.shape[1], device=positions.device)
        self.balance.token_mask(given, positions - place)  # constant within a sequence, another in the next

    def _output_with_loss(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output of a training forward, the balancing loss in its loss; None leaves it as it is."""
        if not (self._training and model.training) or self.balance is None:
            return None
        named = dict(zip(self._names, args, strict=False)) | kwargs
        is_dict, is_tuple = isinstance(output, dict), isinstance(output, tuple | list)
        loss = output.get("loss") if is_dict else output[0] if is_tuple and named.get("labels") is not None else None
        if isinstance(loss, Tensor):
            self._loss = loss.detach().sum() + (0.0 if self._loss is None else self._loss)
        if not self._adds_loss:
            return None
        if loss is None:
            if torch.is_grad_enabled():
                raise UsageError(
                    "the Trainer must take its loss from the model's output, where the balancing loss is added: this "
                    "forward of the training returned none, since it was given no labels. A compute_loss of your own "
                    f"that keeps them back, or data without labels, does that. {_REMEDY}"
                )
            self.balance.loss()  # ends the micro-batch
            return None
        ticket = self.balance.loss()
        total = loss + _share(named, self._shifts) * ticket.to(loss.device)
        logits = output.get("logits") if is_dict else None
        if ticket.requires_grad and isinstance(logits, Tensor) and logits.requires_grad:
            served: list[bool] = []
            ticket.register_hook(lambda _: served.append(True))  # runs before what was made before it
            logits.register_hook(partial(_check_served, served))
        if is_dict:
            output["loss"] = total
            return output
        return (total, *output[1:])

    # ---- checkpoints ----

    def _has_open_window(self) -> bool:
        return self.balance is not None and self.balance.has_open_window

    def _save(self, folder: Path) -> None:
        """Writes into a folder what the weights in it do not hold."""
        if self.balance is None:
            return
        if self._beside_weights:
            write_biases(folder, self.balance.biases, self.balance.multiplies)
        if self._training and not self._has_open_window():
            torch.save(self.balance.state_dict() | {"alerts": self._alerts.state_dict()}, folder / STATE_FILE)

    def _load(self, folder: Path) -> None:
        assert self.balance is not None
        path, state, error = folder / STATE_FILE, None, None
        try:
            if path.exists():
                state = torch.load(path, map_location="cpu", weights_only=True)
            elif not self._fresh:
                raise EquipoiseError(
                    f"a checkpoint must hold {STATE_FILE}: {folder} does not, so it was saved without this callback, "
                    "or on another node. Copy it to every node (save_on_each_node=True writes it there), or begin with "
                    "the biases that the model holds: EquipoiseCallback(..., fresh=True)."
                )
        except Exception as caught:
            error = caught
        has_state = self.balance.agree("loading a checkpoint", state is not None, error)
        if all(has_state):
            assert state is not None
            alerts = state.pop("alerts", None)  # none in checkpoints of before there were any
            self.balance.load_state_dict(state)
            if alerts is not None:
                self._alerts.load_state_dict(alerts)
        elif any(has_state):
            raise EquipoiseError(
                f"every rank must find {path}: some do, rank {has_state.index(False)} does not. Copy it there."
            )


_REMEDY = (
    "Take it from there, as outputs['loss']; or add callback.balance.loss() to your own, weighed alike, and say so by "
    "EquipoiseCallback(..., add_loss=False); or balance without a loss, by loss-free or quantile."
)


class _Hook:
    """A method of the callback as a hook of the model's forward. A copy of the model carries one that does nothing."""

    def __init__(self, callback: EquipoiseCallback | None = None, method: str = ""):
        self.callback, self.method = callback, method

    @torch.compiler.disable
    def __call__(self, *args: Any) -> Any:
        return None if self.callback is None else getattr(self.callback, self.method)(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


class _SavePretrained:
    """``save_pretrained`` of one model, which saves the biases too. That of a copy saves what it always did."""

    def __init__(self, model: Any, callback: EquipoiseCallback | None = None):
        self.model, self.callback = model, callback

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        original = type(self.model).save_pretrained
        result = original(self.model, save_directory, *args, **kwargs)
        given = inspect.signature(original).bind(self.model, save_directory, *args, **kwargs).arguments
        if self.callback is not None and given.get("is_main_process", True):
            self.callback._save(Path(save_directory))
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        return _SavePretrained, (self.model,)


def _check_served(served: list[bool], grad: Tensor) -> None:
    if not served:
        raise EquipoiseError(
            "the Trainer must take its loss from the model's output, where the balancing loss was added: this backward "
            f"began without it. A compute_loss of your own that takes outputs.logits drops it. {_REMEDY}"
        )


def _share(named: dict[str, Any], shifts: bool) -> Tensor | float:
    """The label tokens of this micro-batch, of all those by which the Trainer lets the model divide; 1 where it does
    not."""
    total, labels = named.get("num_items_in_batch"), named.get("shift_labels")
    if labels is None:
        labels = named.get("labels")
        labels = labels[..., 1:] if shifts and isinstance(labels, Tensor) else labels
    if total is None or not isinstance(labels, Tensor):
        return 1.0
    number = labels.ne(IGNORED).sum()
    return number / (total.to(number.device) if isinstance(total, Tensor) else total)


def _shifts_labels(model: nn.Module) -> bool:
    """Whether the loss predicts label i + 1 at place i, so that the first label is no target: as the Trainer asks."""
    is_causal = LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss
    return is_causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


def _load_what_was_left_out(model: Any, folder: Path) -> None:
    """Experts, which the Trainer leaves out when it loads a checkpoint (transformers #48805, open): ``save_pretrained``
    writes them one by one, and the Trainer looks for them under the names that they have in the model."""
    files = [*folder.glob("model*.safetensors")]
    if not files or not isinstance(model, PreTrainedModel):
        return
    names: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as weights:
            names |= {*weights.keys()}
    tied = {name for names in getattr(model, "all_tied_weights_keys", {}).items() for name in names}
    left_out = model.state_dict().keys() - names - tied
    if left_out:
        loaded = type(model).from_pretrained(folder).state_dict()
        model.load_state_dict({name: loaded[name] for name in left_out}, strict=False)
        _log.warning(
            f"EquipoiseCallback: the Trainer left {len(left_out)} weights of {folder} out (transformers #48805), such "
            f"as {min(left_out)}; they are loaded now."
        )


def _is_used(where: Any, name: str, router: nn.Module) -> bool:
    return _IDLE not in name and (where is None or where(name, router))


def _is_trained(router: nn.Module, model: nn.Module) -> bool:
    """Whether the router, or an adapter of PEFT around it, has a weight that is trained."""
    for around in model.modules():
        inside = around
        while isinstance(inside._modules.get("base_layer"), nn.Module):
            inside = inside.get_submodule("base_layer")
        if inside is router and any(p.requires_grad for p in around.parameters()):
            return True
    return False


def _trainer_that_calls() -> tuple[Any, Path | None]:
    """The Trainer that calls its callbacks, and the checkpoint that it resumes from: no event is told either."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            folder = frame.f_locals["resume_from_checkpoint"]
            return caller, Path(folder) if isinstance(folder, str | Path) else None
        frame = frame.f_back
    return None, None
