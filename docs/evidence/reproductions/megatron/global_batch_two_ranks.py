"""global_aux_loss is half as strong on two data-parallel ranks, and wrong if they have unequal numbers of tokens.

Megatron-Core 0.19.2: probabilities of one rank are divided by the tokens of all ranks, and data parallelism averages
(issue #3672). All tokens are taken for the tokens here times ranks, unless a padding mask is passed. Expected: the
gradient of one process. Actual: half of it; for 8 and 40 tokens 0.19 of its size away. Starts two ranks on a CPU.
"""

import torch
import torch.distributed as dist

torch.cuda.current_device = lambda: "cpu"  # in place of a GPU
from megatron.core import parallel_state, transformer  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402


def main(rank):
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29533", rank=rank, world_size=2)
    parallel_state.initialize_model_parallel()
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_moe_experts": 8, "moe_router_topk": 2}
    options = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 1.0, "add_bias_linear": False}
    config = transformer.TransformerConfig(**sizes, **options, use_cpu_initialization=True)
    for rows, cases in ((2, ((12, 40), (12, 41))), (1, ((8, 42), (40, 43)))):  # (length, seed) of each rank
        random = [torch.randn(rows, n, 8, generator=torch.Generator().manual_seed(seed)) for n, seed in cases]
        all_hidden = [hidden + torch.linspace(0.8, -0.8, 8) for hidden in random]
        router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
        weight = torch.nn.init.eye_(router.weight).detach().clone().requires_grad_()
        (0.0 * router(all_hidden[rank].transpose(0, 1).contiguous())[0].sum()).backward()
        dist.all_reduce(actual := router.weight.grad / 2)  # data parallelism averages
        scores = [(hidden.flatten(0, 1) @ weight.t()).softmax(-1) for hidden in all_hidden]
        counts = sum(torch.nn.functional.one_hot(s.topk(2).indices, 8).sum((0, 1)) for s in scores)
        (8 * (counts / counts.sum() * sum(s.mean(0) for s in scores) / 2).sum()).backward()
        size = weight.grad.norm()
        if rank == 0:
            print([rows * n for n, _ in cases], "tokens: expected strength 1, distance 0; actual", end=" ")
            print(f"{(actual * weight.grad).sum() / size**2:.4f}, {(actual - weight.grad).norm() / size:.4f}")


if __name__ == "__main__":
    torch.multiprocessing.spawn(main, nprocs=2)
