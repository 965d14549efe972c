"""The load imbalance that is logged is the largest of the ranks' own. ai2-olmo-core 3.0.0, torch 2.13, CPU, two ranks.

The trainer reduces a metric as it says: "load imbalance" by the maximum. Two ranks with opposite loads are nearly even.
Expected: max / mean of the counts of both ranks, 1.167. Actual: 1.667.
"""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from olmo_core.nn.moe.router import MoERouterConfig


def train(rank, store):
    dist.init_process_group("gloo", f"file://{store}/group", rank=rank, world_size=2)
    router = MoERouterConfig(top_k=2, bias_gamma=1e-3, gating_function="sigmoid").build(8, 8)
    router.weight.data.copy_(torch.eye(8).flatten())
    x = torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(113))[0] + torch.linspace(0.8, -0.8, 8)
    router(x if rank == 0 else x.flip(-1))
    counts = router.batch_size_per_expert.clone()
    dist.all_reduce(counts)
    value, kind = router.compute_metrics()["load imbalance"]
    dist.all_reduce(value, {"max": dist.ReduceOp.MAX}[kind])  # as the trainer does
    if rank == 0:
        print(f"expected {counts.max() / counts.mean():.4g}, got {value:.4g} (reduced by {kind})")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as store:
        mp.spawn(train, args=(store,), nprocs=2)
