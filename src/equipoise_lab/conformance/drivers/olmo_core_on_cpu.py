"""What OLMo-core's first MoE needs to run on a CPU.

Importing this replaces the copies of tokens to experts and back, which are kernels for a GPU, by plain indexing. No
router, loss or gradient is touched.
"""

from typing import Any

import torch
from olmo_core.distributed import parallel
from olmo_core.ops import moe as ops
from torch import Tensor


def _gather(x: Tensor, indices: Tensor, bin_ids: Tensor, bins: Tensor, top_k: int) -> Tensor:
    return x[indices.long() // top_k]


def _scatter(x: Tensor, indices: Tensor, bin_ids: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    places = indices.long()
    if weights is not None:
        x = x * weights.flatten()[places, None].to(x.dtype)
    return torch.zeros_like(x).index_copy(0, places, x).unflatten(0, (-1, top_k)).sum(1)


def _kept(indices: Tensor, bins: Tensor, size: int) -> list[Tensor]:
    """The assignments that each expert has places for: the first ones."""
    ends = bins.tolist()
    return [indices[start:end][:size].long() for start, end in zip([0, *ends], ends, strict=False)]


def _binned_gather(x: Tensor, indices: Tensor, bins: Tensor, bin_size: int, top_k: int) -> Tensor:
    rows = [x[kept // top_k] for kept in _kept(indices, bins, bin_size)]
    return torch.stack([torch.cat([row, row.new_zeros(bin_size - len(row), x.shape[1])]) for row in rows])


def _binned_scatter(x: Tensor, indices: Tensor, weights: Tensor | None, bins: Tensor, top_k: int) -> Tensor:
    result = x.new_zeros(len(indices), x.shape[-1])
    for rows, kept in zip(x, _kept(indices, bins, x.shape[1]), strict=True):
        scale = 1.0 if weights is None else weights.flatten()[kept, None].to(x.dtype)
        result = result.index_copy(0, kept, rows[: len(kept)] * scale)
    return result.unflatten(0, (-1, top_k)).sum(1)


ops.gather, ops.scatter, ops.binned_gather, ops.binned_scatter = _gather, _scatter, _binned_gather, _binned_scatter


def join_pipeline(model: Any) -> None:
    """What ``TransformerPipelineTrainModule`` does with a stage. Without its schedule, each stage has its own data."""
    stages = parallel.PipelineParallelConfig(degree=2)
    mesh = parallel.build_world_mesh(dp=parallel.DataParallelConfig("ddp"), pp=stages, device_type="cpu")
    model.apply_pp(parallel.get_pp_mesh(mesh))
