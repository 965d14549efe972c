"""``balanced``: a config of torchtitan's ``Trainer`` whose trainer balances."""

import logging
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from typing import Any

from equipoise.attachment import resolve
from equipoise.balancers import Balancer, format_strategy
from equipoise.errors import EquipoiseError, UsageError
from equipoise.integrations.framework_import import explained

__all__ = ["balanced", "check_supported"]

_log = logging.getLogger("equipoise")


def balanced(config: Any, *balancers: Balancer | str) -> Any:
    """A config like ``config``, whose ``Trainer`` balances the mixture-of-experts layers of its model.

        config = balanced(config, "loss-free:rate=1e-3")

    The trainer attaches the balancers after the model is parallelised, in place of torchtitan's own update of
    ``expert_bias_E``. The new config has a field ``balance``, the strategy string, which the command line may change:
    ``--balance quantile``. It works for any subclass of ``Trainer``.

    A micro-batch of n tokens that count has the balancing loss

        n / N * coefficient * sum over layers of the loss

    N counts the tokens of the step, over all ranks and micro-batches: torchtitan weighs its own loss so. A token counts
    if it has a label, or if a label follows in its document (``positions`` that go on by one). The loss that is logged
    is the model's, without the balancing loss.

    Every logged step has the metrics ``balance/maxvio_batch`` and so on, those of ``Balance.metrics``. A checkpoint
    has the state of the balancers under ``balance``. ``trainer.balances`` holds a ``Balance`` for each part of the
    model: one, or one for each pipeline stage of this rank.

    Args:
        config: a ``torchtitan.trainer.Trainer.Config``.
        balancers: mechanisms, as objects or strategy strings. With none, or ``"none"``, the trainer only counts, and
            torchtitan's own update goes on.

    Raises:
        UsageError: a strategy string has an unknown name, option or value, two balancers would move the bias, or
            ``config`` is balanced already.
        EquipoiseError: the config asks for what is not supported, which is named.
        TypeError: an argument has another type.
        ImportError: torchtitan is not installed, or older than 0.3.
    """
    with explained("balanced", "torchtitan", "torchtitan", "0.3"):
        from torchtitan.trainer import Trainer

        from equipoise.integrations.torchtitan.trainer import Balancing

    if not isinstance(config, Trainer.Config):
        raise TypeError(
            f"config must be a torchtitan.trainer.Trainer.Config: got {type(config).__name__}. In a loop of your own, "
            "call equipoise.attach(model, ...)."
        )
    if hasattr(config, "balance"):
        raise UsageError(f"config must be balanced once: it is already, with {config.balance}. Leave one call out.")
    resolved = resolve(balancers)
    values = {option.name: getattr(config, option.name) for option in fields(config) if option.init}
    if not config.training.disable_cuda_graphs:
        _log.warning(
            "balanced: training.disable_cuda_graphs is set. What is counted is counted by Python, which a replay of a "
            "CUDA graph leaves out."
        )
        values["training"] = replace(config.training, disable_cuda_graphs=True)
    owner: Any = config._owner
    balance = ("balance", str, field(default=format_strategy(resolved)))
    names = {"__module__": type(config).__module__, "__qualname__": f"Balanced{type(config).__qualname__}"}
    config_class = make_dataclass("Config", [balance], bases=(type(config),), namespace=names, kw_only=True, slots=True)
    namespace = {"Config": config_class, "__module__": owner.__module__, "balancers": tuple(resolved)}
    type(f"Balanced{owner.__name__}", (Balancing, owner), namespace)  # makes itself the owner of its config
    new = config_class(**values)
    check_supported(new, resolved)
    return new


def check_supported(config: Any, balancers: Sequence[Balancer]) -> None:
    """Raises ``EquipoiseError`` if a config asks for what would be counted or weighed wrong, or was never tested."""
    parallelism = config.parallelism
    has_loss = any(balancer.has_loss for balancer in balancers)
    has_sequences = any(balancer.has_loss and balancer.scope == "sequence" for balancer in balancers)
    has_contexts = parallelism.context_parallel_degree > 1
    splits_rows = has_contexts or (parallelism.expert_parallel_degree > 1 and parallelism.tensor_parallel_degree > 1)
    reasons = {
        "training.disable_cuda_graphs must be set": not config.training.disable_cuda_graphs,
        "a loss of scope sequence needs whole rows on every rank: under context parallelism, and under expert beside "
        "tensor parallelism, each rank routes a part of every row. Take scope=global_batch": (
            has_sequences and splits_rows
        ),
        "a loss cannot be beside layers of multi-token prediction under expert and tensor parallelism: the ranks have "
        "unequal parts of the tokens of such a layer. Take a strategy without a loss": (
            has_loss and splits_rows and bool(getattr(config.model_spec.model, "mtp_layers", None))
        ),
        "context_parallel_load_balancer must be headtail or None: ptrr orders the tokens by attention masks": (
            has_contexts and parallelism.context_parallel_load_balancer == "ptrr"
        ),
        f"pipeline_parallel_schedule {parallelism.pipeline_parallel_schedule} splits its backward, under which no "
        "loss of a balancer was tested. Take 1F1B, or a strategy without a loss": (
            has_loss and parallelism.pipeline_parallel_degree > 1 and _splits_backward(parallelism)
        ),
        "debug.spmd_typechecking must be off: what a balancer adds has no types": config.debug.spmd_typechecking,
        "the Trainer must run its model in Python: that of graph_trainer traces the whole step": (
            "graph_trainer" in type(config).__module__
        ),
    }
    for reason, is_so in reasons.items():
        if is_so:
            raise EquipoiseError(f"balanced: {reason}.")


def _splits_backward(parallelism: Any) -> bool:
    schedule = parallelism.pipeline_parallel_schedule.lower()
    return bool(parallelism.pipeline_parallel_schedule_csv) or "zero" in schedule or "dualpipe" in schedule
