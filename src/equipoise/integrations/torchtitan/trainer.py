"""What a balanced ``Trainer`` of torchtitan does besides, and the hooks on the parts of its model.

The loss of torchtitan is a sum over tokens, divided by the tokens of the step that have a label, over all ranks.
Gradients are summed over micro-batches and over data parallel ranks: its FSDP2 does not divide. So the balancing
losses, which are means over tokens, get weights that sum to 1. The tokens of a step are summed before its forwards.

Each forward of a part gets its ``MicroBatch`` as an argument, which a hook takes off. So the stages of a pipeline know
their padding too. A stage of a pipeline has no loss that ``balance.loss()`` could be added to. So another hook ties it
to the output of the stage. When the backward reaches that output, the balancing loss gets the weight of its
micro-batch.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from equipoise.alerts import Alerts
from equipoise.attachment import attach
from equipoise.balance import Balance
from equipoise.balancers import Balancer, format_strategy, parse_strategy
from equipoise.counting.window_metrics import without_constants
from equipoise.errors import EquipoiseError
from equipoise.integrations.torchtitan.config import check_supported
from equipoise.integrations.torchtitan.state import BalanceState
from equipoise.integrations.torchtitan.tokens import MicroBatch, counted_tokens, documents, shifted_labels
from equipoise.torch_internals import is_shape_inference

__all__ = ["Balancing"]

_ARGUMENT = "equipoise_micro_batch"  # of the forward of a part of the model, until the hook takes it off
_log = logging.getLogger("equipoise")


class _WithTicket(torch.autograd.Function):
    """The identity on the output of a model, whose backward begins that of the ticket, with a weight."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, ticket: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight.to(ticket.dtype)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradient, ctx.weight, None


def _is_inside(prefix: str, name: str) -> bool:
    return name.startswith(prefix)


class _PartHooks:
    """The hooks on one part of the model."""

    def __init__(self, part: nn.Module, balance: Balance):
        self.balance = balance
        self.weight: Tensor | None = None  # of the micro-batch that is under way
        part.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True)
        part.register_forward_hook(self.after)

    def before(self, part: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        micro_batch: MicroBatch | None = kwargs.get(_ARGUMENT)
        if micro_batch is None:  # an evaluation
            return None
        if part.training and torch.is_grad_enabled() and not is_shape_inference():
            self.weight = micro_batch.weight
            self.balance.token_mask(micro_batch.mask, micro_batch.sequence_ids)
            for depth, mask in enumerate(micro_batch.mtp_masks):
                self.balance.token_mask(
                    mask, micro_batch.sequence_ids, where=partial(_is_inside, f"mtp_layers.{depth}.")
                )
        return args, {name: value for name, value in kwargs.items() if name != _ARGUMENT}

    def after(self, part: nn.Module, args: Any, output: Any) -> Any:
        weight, self.weight = self.weight, None
        if weight is None:
            return None
        ticket = self.balance.loss()
        outputs = output if isinstance(output, list | tuple) else [output]
        if not ticket.requires_grad or not outputs[0].requires_grad:
            return None
        first = _WithTicket.apply(outputs[0], ticket, weight)
        return first if output is outputs[0] else type(output)([first, *outputs[1:]])


class Balancing:
    """Comes before the class of a ``Trainer`` among the bases of a balanced one. See ``balanced``."""

    balancers: Sequence[Balancer] = ()  # what ``balanced`` was given
    balances: list[Balance]

    def __init__(self, config: Any):
        if config.balance != format_strategy(self.balancers):  # changed on the command line
            self.balancers = parse_strategy(config.balance)
        check_supported(config, self.balancers)
        self.balances = []
        self._tokens_of_step: Any = None
        self._own_update = config.model_spec.post_optimizer_build_fn
        config.model_spec = replace(config.model_spec, post_optimizer_build_fn=self._attach)
        super().__init__(config)  # type: ignore[call-arg]
        trainer: Any = self
        self._alerts = Alerts(num_steps=config.training.steps)
        self._logged_loss: float | None = None  # of this step, if it is logged
        self._log_of_trainer, trainer.metrics_processor.log = trainer.metrics_processor.log, self._log
        if config.checkpoint.enable:
            trainer.checkpointer.states["balance"] = BalanceState(self.balances)

    def _attach(self, optimizers: Any, model_parts: list[nn.Module], parallel_dims: Any) -> None:
        """Takes the place of what torchtitan does after it has made the optimizers: to register its own update."""
        from torchtitan.components.optimizer import register_moe_load_balancing_hook

        trainer: Any = self
        is_replaced = self.balancers and self._own_update is register_moe_load_balancing_hook
        if self._own_update is not None and not is_replaced:
            self._own_update(optimizers, model_parts, parallel_dims)
        group = _ranks_with_other_tokens(parallel_dims)
        for part in model_parts:
            balancers = copy.deepcopy(self.balancers)
            balance = attach(part, *balancers, group=group, allow_empty=parallel_dims.pp_enabled)
            balance.follow(optimizers)
            _PartHooks(part, balance)
            self.balances.append(balance)
        self._check_any_layer(parallel_dims)
        for note in self.balances[0].notes(trainer.config.training.steps):
            _log.warning(note)

    def _check_any_layer(self, parallel_dims: Any) -> None:
        """A stage may be without routers, but not all of a pipeline."""
        trainer: Any = self
        number = torch.tensor(sum(len(balance.layers) for balance in self.balances), device=trainer.device)
        if parallel_dims.pp_enabled:
            dist.all_reduce(number, group=parallel_dims.get_mesh("pp").get_group())
        if number == 0:
            raise EquipoiseError(
                "a balanced model must have mixture-of-experts layers: no stage of this pipeline has a router. Build "
                "the config without balanced()."
            )

    # ---- what a trainer does at every step ----

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        """Sums the tokens of the step that count, then trains on its micro-batches."""
        trainer: Any = self
        number = trainer.gradient_accumulation_steps * trainer.num_pipeline_parallel_microbatches
        batches = list(islice(data_iterator, number))
        total = torch.zeros((), dtype=torch.int64)
        for inputs, labels in batches:  # they are on the host
            total += counted_tokens(labels, inputs.get("positions")).sum()
        total = total.to(trainer.device)
        if trainer.parallel_dims.dp_enabled:
            dist.all_reduce(total, group=trainer.parallel_dims.get_mesh("batch").get_group())
        self._tokens_of_step = total.clamp_min(1)
        super().train_step(iter(batches))  # type: ignore[misc]
        self._warn()

    def _warn(self) -> None:
        """Shows the window of this step to the alerts, whether the step is logged or not."""
        trainer: Any = self
        loss, self._logged_loss = self._logged_loss, None
        load = {name: counts for balance in self.balances for name, counts in balance.peek_load().items()}
        if not load:  # a stage without routers
            return
        biases = {name: bias for balance in self.balances for name, bias in balance.biases.items()}
        self._alerts.strategy = self.balances[0].strategy
        self._alerts.num_seen = trainer.step - 1  # of the whole training, also in a resumed run
        ranks_of_a_stage = dist.get_world_size() // trainer.parallel_dims.pp
        for alert in self._alerts.see(load, loss, biases):  # equal on all ranks of a stage, so one of them says it
            if dist.get_rank() % ranks_of_a_stage == 0:
                _log.warning(f"step {trainer.step}: {alert}")

    def post_dataloading_process(self, input_dict: dict[str, Tensor], labels: Tensor) -> Any:
        """Adds what the routers need to know of a micro-batch to the arguments of its forward."""
        micro_batch = self._micro_batch(labels, input_dict.get("positions"))
        inputs, labels, arguments = super().post_dataloading_process(input_dict, labels)  # type: ignore[misc]
        return inputs, labels, {**arguments, _ARGUMENT: micro_batch}

    def _micro_batch(self, labels: Tensor, positions: Tensor | None) -> MicroBatch:
        trainer: Any = self
        masks = [counted_tokens(labels, positions)]
        number = max(len(getattr(part, "mtp_layers", None) or ()) for part in trainer.model_parts)
        masks += [counted_tokens(shifted_labels(labels, positions, 1 + n), positions) for n in range(number)]
        has_sequences = any(balancer.has_loss and balancer.scope == "sequence" for balancer in self.balancers)
        ids = documents(labels, positions) if has_sequences else None
        if trainer.parallel_dims.cp_enabled:
            from torchtitan.distributed.context_parallel import cp_shard

            order = trainer.config.parallelism.context_parallel_load_balancer
            masks = list(cp_shard(trainer.parallel_dims.get_mesh("cp"), tuple(masks), None, order)[0])
        if splits_rows(trainer.parallel_dims):
            mesh = trainer.parallel_dims.get_mesh("tp")
            masks = [mask.chunk(mesh.size(), dim=1)[mesh.get_local_rank()] for mask in masks]
        mask, *mtp_masks = masks
        return MicroBatch(mask, ids, tuple(mtp_masks), mask.sum() / self._tokens_of_step)

    def _log(self, step: int, loss: float, *args: Any, extra_metrics: Any = None, **kwargs: Any) -> None:
        """Logs the metrics of the balancing with those of torchtitan."""
        metrics = dict(extra_metrics or {})
        for number, balance in enumerate(self.balances):
            prefix = "balance" if len(self.balances) == 1 else f"balance/{number}"
            shown = without_constants(balance.metrics())
            metrics |= {f"{prefix}/{name}": value for name, value in shown.items()}
        self._logged_loss = loss
        self._log_of_trainer(step, loss, *args, extra_metrics=metrics, **kwargs)


def splits_rows(parallel_dims: Any) -> bool:
    """Whether each tensor parallel rank routes a part of every row: torchtitan does so beside expert parallelism."""
    return bool(parallel_dims.ep_enabled and parallel_dims.tp_enabled)


def _ranks_with_other_tokens(parallel_dims: Any) -> Any:
    """The ranks that route other tokens of the same layers, as a mesh; this rank alone if there are none."""
    axes = ["batch", "cp", "tp"] if splits_rows(parallel_dims) else ["batch", "cp"]
    axes = [axis for axis in axes if parallel_dims.get_optional_mesh(axis) is not None]
    if axes:
        return parallel_dims.get_mesh(axes)
    return parallel_dims.get_optional_mesh("batch", include_singleton_axes=True)
