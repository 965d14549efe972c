"""What ``megatron.training`` does around Megatron-Core. PyPI's package does not hold it.

Each method does what the function of its name does in ``megatron/training`` or ``pretrain_gpt.py`` of the repository,
in the same order, without timers, learning rates and logs. Nothing here computes anything of a router or of balancing.
The model is a ``GPTModel`` whose layers have no attention: without Transformer Engine it refuses packed sequences.
"""

import math
from collections.abc import Sequence
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise_lab.conformance.driver import Batch

from equipoise_lab.conformance.drivers import megatron_on_cpu  # isort: skip  (before megatron)
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

__all__ = ["Training"]


class Training:
    """``setup_model_and_optimizer``. Weights depend on the configuration alone. The learning rate is 0.

    Args:
        hidden_size: of the model.
        moe_layer_freq: by layer, 1 if it has experts. If one of two has none, each is a pipeline stage.
        dtype: of the model, which has mixed precision if it is of 16 bits.
        grad_norm_skip_threshold: of ``OptimizerConfig``: with a larger gradient a step is skipped.
        options: of ``TransformerConfig``.

    Attributes:
        routers: of this rank.
        hidden: ``[layers, length, rows, experts]``, of the micro-batch that was last taken, in the type of the model.
        routing_map: of the last router that ran.
        counts: what routers had counted in a step, when it came to ``finalize_model_grads``, summed over ranks.
        gradients: of the gates, after ``finalize_model_grads``.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_layer_freq: list[int],
        dtype: torch.dtype,
        grad_norm_skip_threshold: float = math.inf,
        **options: Any,
    ):
        stages = 2 - min(moe_layer_freq)
        megatron_on_cpu.start(pipeline_model_parallel_size=stages)
        get_moe_metrics_tracker().metrics.clear()  # of a training before, in this process
        torch.manual_seed(0)
        self.config = config = TransformerConfig(
            num_layers=len(moe_layer_freq),
            moe_layer_freq=moe_layer_freq,
            hidden_size=hidden_size,
            num_attention_heads=2,
            add_bias_linear=False,
            use_cpu_initialization=True,
            pipeline_model_parallel_size=stages,
            pipeline_dtype=dtype,
            batch_p2p_comm=False,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            finalize_model_grads_func=self._finalize_model_grads,
            **options,
        )
        spec: Any = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
        head = None
        if config.mtp_num_layers:  # it asks for the attention of its layer
            head = get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)
        else:
            for layer in spec.layer_specs:
                layer.submodules.self_attention, layer.submodules.self_attn_bda = IdentityOp, IdentityFuncOp
        ends = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
        self._model: Any = GPTModel(config, spec, 8, 256, *ends, mtp_block_spec=head)
        self.routers = [module for module in self._model.modules() if isinstance(module, TopKRouter)]
        for router in self.routers:
            router.register_forward_hook(self._see_routing_map)
        is_half = config.fp16 or config.bf16
        inner = Float16Module(config, self._model) if is_half else self._model
        ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self.model: Any = DistributedDataParallel(config, ddp_config, inner)
        types: dict[str, Any] = {"params_dtype": dtype, "fp16": config.fp16, "bf16": config.bf16}
        optimizer_config = OptimizerConfig(lr=0.0, grad_norm_skip_threshold=grad_norm_skip_threshold, **types)
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.model])
        config.grad_scale_func = self.optimizer.scale_loss

    def _see_routing_map(self, router: Any, inputs: Any, output: Any) -> None:
        self.routing_map: Tensor = output[1]

    def _finalize_model_grads(self, *arguments: Any, **options: Any) -> None:
        self.counts = [router.local_tokens_per_expert.clone() for router in self.routers if router.enable_expert_bias]
        for count in self.counts:
            dist.all_reduce(count, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
        finalize_model_grads(*arguments, **options)
        self.gradients = [router.weight.main_grad.clone() for router in self.routers]

    def _forward_step(self, weight: float, data: Any, model: Any) -> Any:
        batch: Batch = next(data)
        self.hidden = batch.logits.transpose(1, 2).contiguous().to(self.config.params_dtype)
        rows, length = batch.logits.shape[1:3]
        loss_mask = torch.ones(rows, length)
        for is_counted in (batch.mask, batch.labels):
            loss_mask = loss_mask if is_counted is None else loss_mask * is_counted
        packed = None
        if batch.sequence_ids is not None:  # rows one after the other
            sizes = batch.sequence_ids.flatten().unique_consecutive(return_counts=True)[1]
            ends = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
            packed = PackedSeqParams("thd", ends, ends)
            if hasattr(packed, "tokens_per_sample"):  # since 0.19: the router gets rows again
                packed.tokens_per_sample = length
            else:
                self.hidden = batch.logits.flatten(1, 2)[:, :, None].to(self.config.params_dtype)
            loss_mask = loss_mask.view(1, -1)
        ids = torch.zeros(loss_mask.shape, dtype=torch.int64)
        output = model(
            ids,
            ids,
            torch.ones(1, 1, ids.shape[1], ids.shape[1]).triu(1).bool(),
            labels=ids,
            packed_seq_params=packed,
            padding_mask=None if batch.mask is None else ~batch.mask,
        )
        return output, partial(self._loss_func, loss_mask, weight)

    @staticmethod
    def _loss_func(loss_mask: Tensor, weight: float, output: Tensor) -> Any:
        total, number = (output.float() * loss_mask).sum(), loss_mask.sum().int()
        return weight * total, number, {"lm loss": float(total / number)}

    def forward_backward(self, batches: Sequence[Batch], weight: float = 0.0, forward_only: bool = False) -> Any:
        """The schedule, on micro-batches. ``weight``: of the loss of the model."""
        rows, length = batches[0].logits.shape[1:3]
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, weight),
            data_iterator=iter(batches),
            model=self.model,
            num_microbatches=len(batches),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )

    def train_step(self, batches: Sequence[Batch], weight: float = 0.0) -> float | None:
        """One step. Returns the loss of balancing that ``training_log`` reports for it, summed over layers."""
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.forward_backward(batches, weight)
        self.optimizer.step()
        losses: dict[str, Any] = {}
        get_moe_metrics_tracker().report(
            loss_scale=1 / len(batches),
            iteration=0,
            num_layers=self.config.num_layers,
            moe_layer_freq=self.config.moe_layer_freq,
            mtp_num_layers=self.config.mtp_num_layers,
            total_loss_dict=losses,
        )
        number = sum(self.config.moe_layer_freq) + (self.config.mtp_num_layers or 0)  # it reports the mean
        return float(sum(losses.values())) * number if losses else None

    def evaluate(self, batch: Batch) -> float:
        """The loss of the model."""
        self.model.eval()
        with torch.no_grad():
            losses = self.forward_backward([batch], forward_only=True)
        return float(losses[0]["lm loss"])

    def save_checkpoint(self) -> TemporaryDirectory[str]:
        folder = TemporaryDirectory()
        dist_checkpointing.save({"model": self._model.sharded_state_dict()}, folder.name)
        return folder

    def load_checkpoint(self, folder: TemporaryDirectory[str]) -> None:
        state = dist_checkpointing.load({"model": self._model.sharded_state_dict()}, folder.name)
        self.model.load_state_dict(state["model"])
        self.optimizer.reload_model_params()
