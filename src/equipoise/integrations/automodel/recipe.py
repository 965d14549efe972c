"""Recipes of NeMo Automodel that balance.

The recipe divides the summed cross-entropy by the labels of all micro-batches and ranks, and multiplies it by the
number of ranks, by which FSDP2 and DDP divide. The balancing losses, which are means over tokens, get weights that sum
to 1. Nothing can be added to the recipe's loss, so the weight is given as ``Balance.loss_scale``. For that the tokens
of a step are summed over the ranks before its forwards.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
from nemo_automodel.components.distributed.config import DDPConfig, FSDP2Config
from nemo_automodel.components.distributed.context_parallel.sharder import convert_attention_mask_to_padding_mask
from nemo_automodel.recipes.llm.train_ft import TrainFinetuneRecipeForNextTokenPrediction
from torch import Tensor

from equipoise.alerts import Alerts
from equipoise.attachment import attach, resolve
from equipoise.balance import Balance
from equipoise.balancers import Balancer
from equipoise.counting.window_metrics import without_constants
from equipoise.errors import UsageError

__all__ = ["BalancedRecipe", "balanced"]

_WRAPPED_METHODS = ("_run_train_optim_step", "_forward_backward_step", "run_train_validation_loop", "load_checkpoint")
_MISSING = object()  # in the config; None means the strategy "none"
_log = logging.getLogger("equipoise")


class Balancing:
    """What ``balanced`` adds to a recipe class: it comes before that class."""

    balancers: Sequence[Balancer] | None = None  # what ``balanced`` was given
    balance: Balance

    def __init__(self, cfg: Any):
        super().__init__(cfg)  # type: ignore[call-arg]
        recipe: Any = self
        strategy = recipe.cfg.get("balance", _MISSING)
        if strategy is not _MISSING:
            self.balancers = resolve(["none" if strategy is None else strategy])  # --balance none gives None
        if self.balancers is None:
            raise UsageError(
                "a BalancedRecipe must have a strategy: its YAML file has no section balance. Add one, such as "
                "`balance: loss-free:rate=1e-3`, or `balance: none` to count only."
            )
        self._has_loss = any(balancer.has_loss for balancer in self.balancers)
        self._tokens_of_step, self._has_said_tokens = 1, False

    # ---- setup ----

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        """Attaches the balancers, then restores: ``setup`` calls it when model, optimizer and data are made."""
        if not hasattr(self, "balance"):
            self._attach()
        super().load_checkpoint(restore_from)  # type: ignore[misc]
        scheduler = self.step_scheduler  # type: ignore[attr-defined]
        strategy = self.balance.strategy
        # Its method, because the recipe would save every attribute that has a state_dict.
        self._see = Alerts(num_steps=_num_steps(scheduler), num_seen=scheduler.step, strategy=strategy).see

    def _attach(self) -> None:
        recipe: Any = self
        _check_supported(recipe)
        (model,) = recipe.model_parts
        # The recipe saves and loads every attribute that has a state_dict: this one as balance.pt.
        # All ranks are pooled: every one has tokens of its own, because what splits rows or layers is refused.
        self.balance = attach(model, *(self.balancers or ()))
        self.balance.loss_scale = self._weight
        if recipe.dist_env.is_main:
            for note in self.balance.notes(_num_steps(recipe.step_scheduler)):
                _log.warning(note)

    def _load_checkpoint_tracked_state(self, ckpt_dir: str) -> Any:
        recipe: Any = self
        if (Path(ckpt_dir) / "balance.pt").exists():
            return super()._load_checkpoint_tracked_state(ckpt_dir)  # type: ignore[misc]
        _log.warning(
            f"a checkpoint should hold balance.pt: {ckpt_dir} has none, so it was saved by a recipe that did not "
            "balance. The biases begin as its weights have them, at zero if they have none; all else begins anew."
        )
        recipe.untrack_state("balance")
        try:
            return super()._load_checkpoint_tracked_state(ckpt_dir)  # type: ignore[misc]
        finally:
            self.balance = self.balance  # the recipe tracks it again

    # ---- every step ----

    def _run_train_optim_step(self, batches: list[dict[str, Any]], max_grad_norm: float | None = None) -> Any:
        """Sums the tokens of the step that count, trains on its micro-batches, and moves the biases."""
        recipe: Any = self
        if self._has_loss:
            num_tokens = torch.tensor(sum(_num_counted(batch) for batch in batches))
            self._tokens_of_step = max(1, int(recipe._dp_allreduce(num_tokens)))
        sample = super()._run_train_optim_step(batches, max_grad_norm)  # type: ignore[misc]
        self.balance.step()
        metrics = self.balance.metrics()
        if self._has_loss and metrics["tokens"] != self._tokens_of_step:
            self._say_tokens_differ(metrics["tokens"])
        if recipe.dist_env.is_main:
            for alert in self._see(self.balance.load, sample.metrics["loss"], self.balance.biases):
                _log.warning(f"step {sample.step}: {alert}")
        sample.metrics |= {f"balance/{name}": value for name, value in without_constants(metrics).items()}
        return sample

    def _weight(self, num_tokens: Tensor) -> Tensor:
        """The weight of a micro-batch's balancing loss, for this many tokens on this rank."""
        recipe: Any = self
        num_ranks: int = recipe._get_dp_group_size(include_cp=True)  # FSDP2 and DDP divide by it
        return num_tokens.double() * num_ranks / self._tokens_of_step

    def _say_tokens_differ(self, num_counted: float) -> None:
        recipe: Any = self
        if not self._has_said_tokens and recipe.dist_env.is_main:
            self._has_said_tokens = True
            _log.warning(
                f"the tokens that the routers counted in a step should be those that its batches show: they counted "
                f"{num_counted:.0f}, the padding masks of the batches leave {self._tokens_of_step}. The balancing loss "
                f"weighs {num_counted / self._tokens_of_step:.3f} times what it should. Give each batch a padding_mask."
            )


def balanced(recipe_class: Any, *balancers: Balancer | str) -> Any:
    """A recipe class like ``recipe_class``, whose recipes balance the mixture-of-experts layers of their model.

        recipe = balanced(TrainFinetuneRecipeForNextTokenPrediction, "loss-free:rate=1e-3")(cfg)
        recipe.setup()
        recipe.run_train_validation_loop()

    ``BalancedRecipe`` is the same with the strategy in the YAML file, for ``automodel config.yaml``:

        recipe: equipoise.integrations.automodel.recipe.BalancedRecipe
        balance: loss-free:rate=1e-3

    ``setup()`` attaches the balancers before it restores a checkpoint. ``recipe.balance`` is then the ``Balance``. A
    section ``balance`` of the config, or ``--balance`` on the command line, comes before ``balancers``.

    A micro-batch of n tokens that count has the balancing loss

        n / N * coefficient * sum over layers of the loss

    N counts the tokens of the step, over all ranks and micro-batches. The loss that is logged is the model's, without
    the balancing loss. Every step logs ``balance/maxvio_batch`` and so on, the metrics of ``Balance.metrics``. Problems
    that ``Alerts`` finds are warnings of the logger ``equipoise``. A checkpoint has the state in ``balance.pt``.

    Args:
        recipe_class: ``TrainFinetuneRecipeForNextTokenPrediction`` or a subclass that trains by its steps.
        balancers: mechanisms, as objects or strategy strings. ``"none"`` only counts.

    Raises:
        UsageError: a strategy string has an unknown name, option or value, or two balancers would move the bias; the
            class has training steps of its own. From ``setup()``: the config asks for what is not supported.
        TypeError: an argument has another type.
    """
    plain_class = TrainFinetuneRecipeForNextTokenPrediction
    if not (isinstance(recipe_class, type) and issubclass(recipe_class, plain_class)):
        name = getattr(recipe_class, "__name__", type(recipe_class).__name__)
        raise TypeError(
            f"recipe_class must be TrainFinetuneRecipeForNextTokenPrediction or a subclass: got {name}. In another "
            "recipe call equipoise.attach after its setup()."
        )
    if issubclass(recipe_class, Balancing):
        raise UsageError(f"recipe_class must be balanced once: {recipe_class.__name__} is already. Leave one call out.")
    changed = [name for name in _WRAPPED_METHODS if getattr(recipe_class, name) is not getattr(plain_class, name)]
    if changed:
        raise UsageError(
            f"recipe_class must train by the steps of {plain_class.__name__}: {recipe_class.__name__} has its own "
            f"{', '.join(changed)}, with which balancing was never tested. Call equipoise.attach after its setup()."
        )
    namespace = {"__module__": __name__, "balancers": tuple(resolve(balancers)) if balancers else None}
    return type(f"Balanced{recipe_class.__name__}", (Balancing, recipe_class), namespace)


class BalancedRecipe(Balancing, TrainFinetuneRecipeForNextTokenPrediction):  # type: ignore[misc, unused-ignore]
    """``TrainFinetuneRecipeForNextTokenPrediction`` with its strategy in the config, as ``balance``: ``balanced``."""


def _num_counted(batch: Mapping[str, Any]) -> int:
    """The tokens of a batch that are not padding, as a model reads them from it."""
    masks = {name: batch[name] for name in ("padding_mask", "attention_mask") if batch.get(name) is not None}
    convert_attention_mask_to_padding_mask(masks)
    if "padding_mask" in masks:
        return int((~masks["padding_mask"].bool()).sum())
    return int(batch["labels"].numel())


def _num_steps(scheduler: Any) -> int:
    """The steps of the whole run: ``max_steps``, or fewer if the epochs end earlier and their length is known."""
    if scheduler.epoch_len is None:
        return int(scheduler.max_steps)
    return int(min(scheduler.max_steps, scheduler.num_epochs * scheduler.epoch_len))


def _check_supported(recipe: Any) -> None:
    """Raises ``UsageError`` if the config asks for what would be counted or weighed wrong, or was never tested."""
    mesh = recipe.mesh_context
    reasons = {
        "distributed.pp_size must be 1: the schedule of a pipeline weighs its losses otherwise": recipe.pp_enabled,
        "distributed.cp_size must be 1: each context parallel rank routes a part of every row": mesh.cp_size > 1,
        "distributed.tp_size must be 1: tensor parallel ranks may route parts of a row": mesh.tp_size > 1,
        f"distributed.strategy must be fsdp2 or ddp: got {type(recipe.distributed_config).__name__}": (
            not isinstance(recipe.distributed_config, FSDP2Config | DDPConfig)
        ),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise UsageError(
                f"{reason}. This was never tested with a balanced recipe. In a plain recipe call equipoise.attach "
                "after setup(), with group=... for the ranks that hold different tokens."
            )


def main(config_path: str | None = None) -> None:
    """Runs a ``BalancedRecipe`` by the command line: ``-c config.yaml --key=value``."""
    recipe: Any = BalancedRecipe(parse_args_and_load_config(config_path))
    recipe.setup()
    recipe.run_train_validation_loop()


if __name__ == "__main__":  # `automodel config.yaml` starts this file on several devices
    main()
