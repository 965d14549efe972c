"""What torchtitan needs to run on a CPU.

Four things are replaced, and no router, loss or gradient is touched:

- the type of the device, which torchtitan takes for CUDA where there is no accelerator;
- ``disable_fsdp_gradient_division``: gradients are summed in two steps, because gloo has no reduction that scales;
- FlexAttention, which has no backward on a CPU, by torchtitan's own ``ScaledDotProductAttention``;
- ``Trainer.__init__``, which also asks for a GPU, a tokenizer and data: ``built`` makes its calls for the model and the
  optimizers, in their order, in a process group on gloo.
"""

import logging
from typing import Any

import torch
import torch.distributed as dist
import torchtitan.distributed.fsdp as titan_fsdp
import torchtitan.distributed.parallel_dims
import torchtitan.tools.utils
from torch import nn
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims
from torchtitan.models.common.attention import ScaledDotProductAttention

torchtitan.tools.utils.device_type, torchtitan.tools.utils.device_module = "cpu", torch.cpu
torchtitan.distributed.parallel_dims.device_type = "cpu"
logging.getLogger().setLevel(logging.ERROR)  # torchtitan logs to the root

_disable_division = titan_fsdp.disable_fsdp_gradient_division


def _sum_gradients(model: nn.Module) -> None:
    _disable_division(model)
    for module in model.modules():
        if isinstance(module, titan_fsdp.FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


titan_fsdp.disable_fsdp_gradient_division = _sum_gradients


def built(config: Any) -> tuple[Any, Any]:
    """The model and the optimizers of a ``Trainer.Config``."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    _clear_sharding_prop_cache()  # of process groups that have ended
    dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
    spec = config.model_spec
    spec.model.update_from_config(config=config)
    for block in spec.model.layers + spec.model.mtp_layers:
        block.attention.inner_attention = ScaledDotProductAttention.Config()
    with torch.device("meta"), torchtitan.tools.utils.set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = spec.model.build()
    model = spec.parallelize_fn(
        model,
        parallel_dims=dims,
        training=config.training,
        parallelism=config.parallelism,
        compile_config=config.compile,
        ac_config=config.activation_checkpoint,
        dump_folder=config.dump_folder,
    )
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=None)
    model.train()
    optimizers = config.optimizer.build(model_parts=[model])
    spec.post_optimizer_build_fn(optimizers, [model], dims)
    return model, optimizers
