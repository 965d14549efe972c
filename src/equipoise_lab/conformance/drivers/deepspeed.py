"""DeepSpeed: its own MoE layer (TopKGate) in its engine. The user adds l_aux to the loss."""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, NotTried, Recompute, StepResult


class _Layers(nn.Module):  # the user's model: its loss is that of the task, here 0, and l_aux of all layers
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        layers = [
            MoE(layer.experts, nn.Linear(layer.experts, layer.experts), layer.experts, k=layer.k, use_rts=False,
                capacity_factor=layer.capacity or 1.0, drop_tokens=layer.capacity is not None, min_capacity=0,
                top2_2nd_expert_sampling=False)
            for _ in range(layer.number)
        ]  # fmt: skip
        self.gates = [moe.deepspeed_moe.gate.wg.weight for moe in layers]
        for gate in self.gates:
            nn.init.eye_(gate)
        self.moe = nn.ModuleList(layers)

    def forward(self, batch: Batch, recompute: Recompute | None) -> tuple[Tensor, Tensor]:
        used = None if batch.mask is None else batch.mask.flatten().long()
        task, balancing = torch.zeros(()), torch.zeros(())
        for moe, hidden in zip(self.moe, batch.logits, strict=True):
            inputs = hidden.clone().requires_grad_(), used
            if recompute == "own":
                output, l_aux, _ = deepspeed.checkpointing.checkpoint(moe, *inputs)
            elif recompute is not None:
                output, l_aux, _ = checkpoint(moe, *inputs, use_reentrant=recompute == "reentrant")
            else:
                output, l_aux, _ = moe(*inputs)
            task, balancing = task + 0 * output.sum(), balancing + l_aux
        return task, balancing


class DeepSpeed(Driver):
    PACKAGE = "deepspeed"
    INTENDED_USE = {
        "MoE, its l_aux in the loss, engine.backward": "docs/_tutorials/mixture-of-experts.md",
        "checkpointing.configure, checkpoint": "docs/code-docs/source/activation-checkpointing.rst",
        "used_token": "deepspeed/moe/layer.py, MoE.forward: mask only used tokens",
        "top2_2nd_expert_sampling=False, use_rts=False": "deepspeed/moe/layer.py, MoE: options that draw at random",
        "f of the first choice at k = 2": "deepspeed/moe/sharded_moe.py, TopKGate: Top2Gating as described in GShard",
    }

    @classmethod
    def as_defined(cls, layer: Layer) -> Layer:
        return replace(layer, counts_first_choice=layer.k == 2)

    def __init__(self, layer: Layer) -> None:
        if layer.bias_rate is not None or layer.bias is not None or layer.score_function == "sigmoid" or layer.groups:
            raise NotOffered("an expert bias" if layer.bias_rate is not None else "sigmoid scores or expert groups")
        if layer.loss in ("sequence", "global_batch") or layer.pads_to_capacity or layer.sets_coefficient_only:
            raise NotOffered("a loss over sequences or the global batch, or a coefficient: its user adds l_aux")
        if not dist.is_initialized():
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
            store = f"file://{tempfile.mkdtemp()}/store"
            dist.init_process_group("gloo", store, rank=0, world_size=1)
        vars(sys.modules["deepspeed.comm.torch"])["build_shm_op"] = lambda: None  # no C++ compiler is needed then
        deepspeed.comm.comm.cdb = None  # another process group than that of the last training
        groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP = {}, {}
        deepspeed.init_distributed(dist_backend="gloo")
        deepspeed.checkpointing.configure(None)
        self.model = _Layers(layer)

    def train_step(
        self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
        has_finite_gradients: bool = True,
    ) -> StepResult:  # fmt: skip
        if recompute == "own" and deepspeed.__version__ < "0.19":
            raise NotTried("its recomputation needs a GPU in this release")
        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": len(batches), "gradient_clipping": 1e9,
            "zero_allow_untested_optimizer": True,
        }  # fmt: skip
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config)
        gradients: list[Tensor] = []
        optimizer.register_step_pre_hook(lambda *_: gradients.extend(gate.grad.clone() for gate in self.model.gates))
        for batch in batches:
            task, balancing = engine(batch, recompute)
            engine.backward(task + balancing)
            engine.step()
        return StepResult(float(balancing.detach()), gradients)
