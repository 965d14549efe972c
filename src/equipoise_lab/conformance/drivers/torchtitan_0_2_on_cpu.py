"""What torchtitan 0.2 needs to run on a CPU.

Four things are replaced, and no router, loss or gradient is touched:

- the type of the device, which torchtitan takes for CUDA where there is no accelerator;
- ``torch.histc``, by which it counts, and which takes no whole numbers on a CPU: it gets the same numbers as floats;
- the reduction of FSDP2 that scales, which gloo has not: gradients are summed in two steps;
- ``Trainer.__init__``, which also asks for a GPU, a tokenizer and data: ``built`` makes its calls for the model and the
  optimizers, in their order, in a process group on gloo.
"""

from typing import Any

import torch
import torchtitan.tools.utils
from torch import Tensor, distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torchtitan.config import TORCH_DTYPE_MAP
from torchtitan.distributed import ParallelDims, parallel_dims

torchtitan.tools.utils.device_type = parallel_dims.device_type = "cpu"
_histc = torch.histc


def _count(values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _histc(values.float(), *args, **kwargs).to(values.dtype)


torch.histc = _count  # type: ignore[assignment]


def join_group() -> None:
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    _clear_sharding_prop_cache()  # of process groups that have ended


def built(spec: Any, args: Any, config: Any) -> tuple[Any, Any]:
    """The model and the optimizers."""
    degrees = config.parallelism
    dims = ParallelDims(
        dp_replicate=degrees.data_parallel_replicate_degree,
        dp_shard=degrees.data_parallel_shard_degree,
        cp=1,
        tp=1,
        pp=degrees.pipeline_parallel_degree,
        ep=1,
        etp=1,
        world_size=distributed.get_world_size(),
    )
    with torch.device("meta"), torchtitan.tools.utils.set_default_dtype(TORCH_DTYPE_MAP[config.training.dtype]):
        model = spec.model_cls(args)
    model = spec.parallelize_fn(model, dims, config)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device="cpu")
    with torch.no_grad():
        model.init_weights(buffer_device=torch.device("cpu"))
    model.train()
    return model, spec.build_optimizers_fn([model], config.optimizer, dims)


def copy_into(weight: Tensor, values: Tensor) -> None:
    if isinstance(weight, DTensor):
        values = distribute_tensor(values, weight.device_mesh, weight.placements)
    weight.copy_(values)
