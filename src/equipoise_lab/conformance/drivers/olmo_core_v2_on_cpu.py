"""What OLMo-core's second MoE needs to run on a CPU.

Importing this replaces the forward of a block: it has the attention, the router and the attachment of the router's
loss, as ``olmo_core/nn/moe/v2/no_ep.py`` calls them, and leaves out the experts, whose kernels and streams need a GPU.
The model trains in bfloat16; here in the type that is asked for, so that gradients can be compared with float64. Its
optimizer knows bfloat16 by the name of a CUDA type, so there ``SkipStepAdamW`` stands in. Nothing else of a router, a
loss or a gradient is touched.
"""

from types import SimpleNamespace
from typing import Any

import torch
from olmo_core.config import DType
from olmo_core.nn.ddp import block as ddp_block
from olmo_core.nn.ddp.model import OLMoDDPModel
from olmo_core.nn.moe.v2.shared_experts import SharedExpertsConfig
from olmo_core.optim import SkipStepAdamWConfig
from olmo_core.optim.moe_optimizer import OLMoDDPOptimizerConfig
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh


def _forward(block: Any, x: Tensor, *, loss_div_factor: Any = None, **kwargs: Any) -> Tensor:
    hidden = block._res_norm_attn(x, **kwargs)
    *_, losses = block.routed_experts_router(block._prepare_moe_input(hidden), False, loss_div_factor=loss_div_factor)
    return block._attach_routed_aux_loss(hidden, losses)


ddp_block._combined_forward_no_ep = _forward


def built(config: Any, dtype: torch.dtype, is_staged: bool) -> tuple[Any, Any]:
    """The model under its own data parallelism, and its optimizer. A stage of a pipeline has data of its own."""
    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    OLMoDDPModel._training_dtype = dtype
    ranks = distributed.get_world_size()
    shape = (ranks, 1) if is_staged else (1, ranks)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("pp", "dp"))
    model = config.build(init_device="cpu")
    if is_staged:
        model.apply_pp(mesh["pp"])
    model.init_weights(device=torch.device("cpu"), world_mesh={"dense": mesh, "moe": None})
    model = model.apply_dp(mesh["dp"], None)
    if dtype != torch.float32:
        return model, SkipStepAdamWConfig(lr=0.0, rolling_interval_length=4).build(model)
    module: Any = SimpleNamespace(dp_group=mesh["dp"].get_group(), world_mesh={"dense": mesh["dp"], "moe": None})
    return model, OLMoDDPOptimizerConfig(lr=1e-30, rolling_interval_length=4).build([model], module)  # it refuses 0


def leave_out_experts(block: Any) -> None:
    """Makes a block's config that of a dense block."""
    block.routed_experts = block.routed_experts_router = None
    block.shared_experts = SharedExpertsConfig(8, hidden_size=8, num_experts=1, bias=False, dtype=DType.float32)
