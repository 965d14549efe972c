"""LitGPT: its mixture-of-experts block, cast as its commands do it by ``--precision``."""

from collections.abc import Sequence

import lightning
import torch
from litgpt import Config
from litgpt.model import LLaMAMoE
from torch import Tensor, nn

from equipoise_lab.conformance.driver import Batch, Driver, Layer, NotOffered, Recompute, StepResult

PRECISIONS = {torch.float32: "32-true", torch.bfloat16: "bf16-true"}


class LitGPT(Driver):
    PACKAGE = "litgpt"
    INTENDED_USE = {
        "LLaMAMoE with expert groups": "litgpt/config.py: n_expert_groups; litgpt/model.py: LLaMAMoE",
        "Fabric(precision=...), and its set-up of the model": "litgpt/finetune/full.py: setup, main",
    }

    def __init__(self, layer: Layer) -> None:
        if layer.loss is not None:
            raise NotOffered("a balancing loss")
        # Its sigmoid router, the one with a bias, has at least two groups. That both are open is the same as no groups.
        groups, open_groups = layer.groups or (2, 2)
        options = {"n_expert_groups": groups, "n_topk_groups": open_groups, "n_topk_scores_per_group": 2}
        config = Config(
            n_layer=1, n_head=1, n_embd=layer.experts, bias=False, mlp_class_name="LLaMAMoE", moe_intermediate_size=8,
            n_expert=layer.experts, n_expert_per_token=layer.k, norm_topk_prob=layer.normalises_weights,
            **(options if layer.score_function == "sigmoid" else {}),
        )  # fmt: skip
        self.block = LLaMAMoE(config)
        nn.init.eye_(self.block.gate.weight)
        if layer.bias is not None:
            self.block.gate.e_score_correction_bias.copy_(torch.tensor(layer.bias))
        self.cast(layer.dtype)

    def train_step(
        self, batches: Sequence[Batch], *, recompute: Recompute | None = None, is_applied: bool = True,
        has_finite_gradients: bool = True,
    ) -> StepResult:  # fmt: skip
        raise NotOffered("anything that moves its expert bias")

    def biases(self) -> list[Tensor]:
        return [self.block.gate.e_score_correction_bias.float()]

    def choose(self, batch: Batch) -> Tensor:
        chosen: list[Tensor] = []
        hook = self.block.gate.register_forward_hook(lambda module, args, output: chosen.append(output[1]))
        self.model.eval()
        self.model(batch.logits[0])
        hook.remove()
        return chosen[0]

    def default_bias_rate(self) -> float:
        raise NotOffered("anything that moves an expert bias")

    def cast(self, dtype: torch.dtype) -> None:
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=PRECISIONS[dtype])
        self.model = fabric.setup_module(self.block)
