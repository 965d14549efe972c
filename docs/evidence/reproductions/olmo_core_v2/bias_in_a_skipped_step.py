"""The score bias moves in steps that are skipped. ai2-olmo-core 3.0.0, torch 2.13, CPU.

OLMoDDPTrainModule.train_batch calls post_batch(), which moves the bias. optim_step() comes after it, and there the
optimizer may skip the step because its loss is a spike (OLMoDDPOptimizer has the same rule).
Expected: the bias stays too. Actual: it moves.
"""

import torch
from olmo_core.nn.moe.v2.router import MoERouterConfigV2
from olmo_core.optim import SkipStepAdamW


def train(seed, loss, gradient=0.0):
    router = MoERouterConfigV2(d_model=8, num_experts=8, top_k=2, bias_gamma=1e-3, gating_function="sigmoid").build()
    router.weight.data.copy_(torch.eye(8).flatten())
    optimizer = SkipStepAdamW(router.parameters(), rolling_interval_length=4)
    for latest in (1.0, 1.0, 1.0, loss):
        optimizer.latest_loss = torch.tensor(latest)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2, 8, 8, generator=generator)[0] + torch.linspace(0.8, -0.8, 8)
    router.compute_aux_loss(*router(x, False)[-1])
    router.weight.grad = torch.full_like(router.weight, gradient)
    router.post_batch()  # as at the end of train_batch
    optimizer.step()  # as in optim_step
    print(f"optimizer.step_skipped = {optimizer.step_skipped.item()}")
    return router


def bias(router):
    return [round(value / 1e-3) for value in router.score_bias.tolist()]


router = train(90, loss=100.0)
print(f"in a skipped step: expected [0, 0, 0, 0, 0, 0, 0, 0], got {bias(router)}")
