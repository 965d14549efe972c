"""What each rank of a training of Automodel's model runs."""

import torch
from frameworks.automodel_models import gates_of, make_model, make_steps, train
from nemo_automodel.components.moe.parallelizer import apply_fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy


def train_rank(rank, strategies, lengths, factors):
    """By factor and strategy, what comes out under Automodel's own sharding; by factor, what its bias is."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",))
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    results, kinds = {}, {}
    for factor in factors:
        for strategy in strategies:
            model = make_model(gate_bias_update_factor=factor)
            apply_fsdp(model, mesh, ep_enabled=False, ep_shard_enabled=False, mp_policy=policy)
            results[factor, strategy], _ = train(model, make_steps(lengths[rank], rank), strategy)
            kinds[factor] = {type(gate.e_score_correction_bias).__name__ for gate in gates_of(model).values()}
    return results, kinds
