"""A pipeline stage with routed experts waits for one without. ai2-olmo-core 3.0.0, torch 2.13, CPU, two ranks.

OLMoDDPTransformerBlock.apply_pp() does nothing, so MoERouterV2.group stays None, and post_batch() reduces its counts
over all ranks, those of other pipeline stages too. MoEBase.apply_pp() of the first MoE sets the group of the stage.
Expected: the bias moves by the counts of its stage. Actual: it waits until the timeout; if the other stage has as many
routers, no rank waits, and counts of different layers are added.
"""

import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from olmo_core.nn.moe.v2.router import MoERouterConfigV2


def stage(rank, store):
    """Rank 0 has dense blocks only: it has no router to call, and goes on."""
    dist.init_process_group("gloo", f"file://{store}/group", rank=rank, world_size=2, timeout=timedelta(seconds=10))
    if rank == 1:
        router = MoERouterConfigV2(
            d_model=8, num_experts=8, top_k=2, bias_gamma=1e-3, gating_function="sigmoid"
        ).build()
        x = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(81)) + torch.linspace(0.8, -0.8, 8)
        router.compute_aux_loss(*router(x, False)[-1])
        try:
            router.post_batch()
        except RuntimeError as error:
            print(f"expected a bias that moved, got {str(error).splitlines()[0][-60:]}")
    else:
        time.sleep(20)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as store:
        ranks = mp.spawn(stage, args=(store,), nprocs=2, join=False)
        ranks.processes[1].join()
