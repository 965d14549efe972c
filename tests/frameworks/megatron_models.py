"""Tiny models of Megatron-Core, a step of its schedules, and a float64 reference; importable by spawned ranks."""

import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from equipoise_lab.conformance.drivers import megatron_on_cpu  # isort: skip  (before megatron)
import pytest
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import MoETransformerLayer
from torch import Tensor, nn

start, stop = megatron_on_cpu.start, megatron_on_cpu.stop

VOCAB, DIM, EXPERTS, K, LAYERS, LENGTH = 48, 16, 8, 2, 2, 8
COEFFICIENT = 0.5


class MicroBatch(NamedTuple):
    ids: Tensor  # [rows, length]
    is_padding: Tensor  # the same
    positions: Tensor  # the same


def micro_batches(*lengths: Sequence[int], seed: int = 0, length: int = LENGTH) -> list[MicroBatch]:
    """One of each tuple: how many tokens of each row are no padding."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for rows in lengths:
        ids = torch.randint(VOCAB, (len(rows), length), generator=generator)
        positions = torch.arange(length).expand(len(rows), length)
        batches.append(MicroBatch(ids, positions >= torch.tensor(rows)[:, None], positions))
    return batches


UNEVEN = [(8, 3), (5, 8), (1, 6)]  # tokens 11, 13, 7


def config(**options: Any) -> TransformerConfig:
    basic: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": DIM,
        "ffn_hidden_size": DIM,
        "num_attention_heads": 2,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": K,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": options.get("moe_router_score_function", "sigmoid") == "sigmoid",
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "use_cpu_initialization": True,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "sequence_parallel": parallel_state.get_tensor_model_parallel_world_size() > 1,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": parallel_state.get_virtual_pipeline_model_parallel_world_size(),
        "pipeline_dtype": torch.float32,
        "batch_p2p_comm": False,
        "finalize_model_grads_func": finalize_model_grads,
    }
    return TransformerConfig(**basic | options)


def local_spec() -> ModuleSpec:
    return get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)


_NO_ATTENTION = {"input_layernorm": IdentityOp, "self_attention": IdentityOp, "self_attn_bda": IdentityFuncOp}


def gpt(vp_stage: int | None = None, has_attention: bool = True, max_length: int = LENGTH, **options: Any) -> GPTModel:
    """This rank's part of a model whose weights depend on nothing but their names in the whole model.

    Its attention has context parallelism with Transformer Engine only: there leave it out.
    """
    of = config(**options)
    spec = local_spec()
    if isinstance(of.moe_layer_freq, list):
        spec = get_gpt_decoder_block_spec(of, use_transformer_engine=False, vp_stage=vp_stage)
    if not has_attention:
        spec = replace(spec, submodules=replace(spec.submodules, **_NO_ATTENTION))
    more: dict[str, Any] = {}
    if of.mtp_num_layers:
        more["mtp_block_spec"] = get_gpt_mtp_block_spec(of, spec, use_transformer_engine=False)
    model = GPTModel(
        of,
        spec,
        VOCAB,
        max_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
        **more,
    )
    fill(model)
    return model.train()


def hybrid() -> HybridModel:
    """A model of layers of attention and layers of experts in turn."""
    of = local_spec().submodules
    no_experts = {"pre_mlp_layernorm": IdentityOp, "mlp": IdentityOp, "mlp_bda": IdentityFuncOp}
    attention = replace(local_spec(), submodules=replace(of, **no_experts))
    experts = ModuleSpec(MoETransformerLayer, submodules=replace(of, **_NO_ATTENTION))
    layers = hybrid_block.HybridStackSubmodules(attention_layer=attention, moe_layer=experts)
    stack = ModuleSpec(hybrid_block.HybridStack, submodules=layers)
    options: dict[str, Any] = {"hybrid_layer_pattern": "*E*E", "position_embedding_type": "learned_absolute"}
    model = HybridModel(config(num_layers=4), stack, VOCAB, LENGTH, **options)
    fill(model)
    return model.train()


def fill(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        tensor_parts = parallel_state.get_tensor_model_parallel_world_size()
        dim = getattr(parameter, "partition_dim", -1)
        is_split = getattr(parameter, "tensor_model_parallel", False) and tensor_parts > 1 and dim >= 0
        shape = list(parameter.shape)
        if is_split:
            shape[dim] *= tensor_parts
        whole = by_name(global_name(name, model), shape)
        if is_split:
            whole = whole.chunk(tensor_parts, dim)[parallel_state.get_tensor_model_parallel_rank()]
        parameter.data.copy_(whole)


def global_name(name: str, model: nn.Module) -> str:
    """The name of a parameter in the whole model."""
    layers = dict(enumerate(model.decoder.layers))
    experts_here = EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    first_expert = experts_here * parallel_state.get_expert_model_parallel_rank()
    name = re.sub(r"decoder\.layers\.(\d+)", lambda m: f"decoder.layers.{layers[int(m[1])].layer_number - 1}", name)
    return re.sub(r"local_experts\.(\d+)", lambda m: f"local_experts.{int(m[1]) + first_expert}", name)


def by_name(name: str, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(*shape, generator=generator)
    if "layernorm" in name:
        return torch.ones(*shape) + 0.1 * values
    return values * (0.5 if "router" in name else 0.2)


def data_parallel(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model.config, DistributedDataParallelConfig(**options), model)


def optimizer_of(model: DistributedDataParallel, **options: Any) -> Any:
    optimizer = get_megatron_optimizer(OptimizerConfig(**{"optimizer": "adam", "lr": 1e-2} | options), [model])
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


# ---- a step of Megatron's schedules ----


def _loss(weight: float, form: str, is_padding: Tensor, output: Tensor) -> Any:
    counts = (~is_padding).float()
    total = weight * (output * counts).sum()
    if form == "mean":
        return total / counts.sum(), {"loss": total.detach()}
    return total, counts.sum().int(), {"loss": total.detach()}


def arguments(batch: MicroBatch) -> dict[str, Any]:
    length = batch.ids.shape[1]
    return {
        "input_ids": batch.ids,
        "position_ids": batch.positions,
        "attention_mask": torch.ones(1, 1, length, length).triu(1).bool(),  # True: may not attend
        "labels": batch.ids,
        "padding_mask": batch.is_padding,
    }


def forward_backward(
    model: Any, batches: Sequence[MicroBatch], weight: float = 1.0, form: str = "sum", forward_only: bool = False
) -> Any:
    """The forwards and backwards of one step. ``weight``: of the loss of the model; 0 leaves that of balancing."""

    def forward_step(data: Any, chunk: nn.Module) -> Any:
        batch = next(data)
        return chunk(**arguments(batch)), partial(_loss, weight, form, batch.is_padding)

    chunks = model if isinstance(model, list) else [model]
    rows, length = batches[0].ids.shape
    iterators = [iter(batches) for _ in chunks]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )


def gradients(model: Any, routers_only: bool = True) -> dict[str, Tensor]:
    """Of parameters, by their names in the whole model."""
    found = {}
    for chunk in model if isinstance(model, list) else [model]:
        inner = chunk
        while hasattr(inner, "module"):
            inner = inner.module
        for name, parameter in inner.named_parameters():
            gradient = parameter.main_grad if hasattr(parameter, "main_grad") else parameter.grad
            if gradient is not None and ("router" in name or not routers_only):
                found[global_name(name, inner)] = gradient.clone()
    return found


def forget_scale() -> None:
    MoEAuxLossAutoScaler.main_loss_backward_scale = None


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    start()
    yield
    stop()
    torch.distributed.destroy_process_group()


# ---- the reference: autograd over the whole model in float64, without equipoise ----


class Routed(NamedTuple):
    """What one router was asked in one micro-batch."""

    logits: Tensor  # [tokens, experts], rows one after the other
    load: Tensor
    is_padding: Tensor  # [tokens]
    sequence: Tensor  # [tokens]


class Reference:
    """Balancing losses of micro-batches. ``biases``: by layer, added to the scores for the choice."""

    def __init__(self, biases: Any = None, **options: Any):
        self.model = options.pop("model", gpt)(**options).double()
        self.routed: list[dict[str, Routed]] = []
        self.names = {m: n for n, m in self.model.named_modules() if n.endswith("router")}
        self.biases = biases or {}
        self.function = self.model.config.moe_router_score_function
        for router in self.names:
            router.gating = partial(self._gating, router)
            router.enable_expert_bias = False  # its own counting fails under a padding mask
            if router.expert_bias is not None and self.biases:
                router.expert_bias = self.biases[self.names[router]].float()
            router._maintain_float32_expert_bias = lambda: None

    def _gating(self, router: Any, tokens: Tensor) -> Tensor:
        logits = nn.functional.linear(tokens, router.weight)
        by_row = logits.transpose(0, 1)  # [rows, length, experts]
        rows, length = by_row.shape[:2]
        flat, is_padding = by_row.reshape(rows * length, -1), self.is_padding.reshape(-1)
        chosen = self.scores(flat).detach() + self.biases.get(self.names[router], torch.zeros(EXPERTS)).double()
        if router.is_mtp_layer:
            is_padding = self._later(is_padding.view(rows, length), router.layer_number).reshape(-1)
        load = torch.zeros(EXPERTS, dtype=torch.int64)
        for token in range(rows * length):
            if not is_padding[token]:
                for expert in chosen[token].topk(K).indices.tolist():
                    load[expert] += 1
        sequence = torch.arange(rows).repeat_interleave(length)
        self.routed[-1][self.names[router]] = Routed(flat, load, is_padding, sequence)
        return logits

    @staticmethod
    def _later(is_padding: Tensor, distance: int) -> Tensor:
        """Whether the token that is ``distance`` later is padding; the last ones are as the one before them."""
        length = is_padding.shape[1]
        columns = [min(place + distance, length - 1) for place in range(length)]
        return torch.stack([is_padding[:, column] for column in columns], dim=1)

    def scores(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.function == "softmax" else logits.sigmoid()

    def forward(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Adds micro-batches. Returns the loss of each token of the model, [rows, length], of each."""
        outputs = []
        for batch in batches:
            self.routed.append({})
            self.is_padding = batch.is_padding
            outputs.append(self.model(**arguments(batch)))
        return outputs

    def num_tokens(self, number: int) -> int:
        return int((~next(iter(self.routed[number].values())).is_padding).sum())

    def loads(self) -> dict[str, Tensor]:
        return {name: sum(routed[name].load for routed in self.routed) for name in self.routed[0]}

    def loss(self, number: int, scope: str, known: Any = ()) -> Tensor:
        """Of one micro-batch: the sum over layers. ``known``: micro-batches whose counts are pooled, or by layer."""
        total = torch.zeros((), dtype=torch.float64)
        for name, routed in self.routed[number].items():
            p = self.scores(routed.logits)
            p = p / p.sum(-1, keepdim=True)
            counted = ~routed.is_padding
            if scope == "sequence":
                for sequence in range(int(routed.sequence.max()) + 1):
                    inside = counted & (routed.sequence == sequence)
                    f = self._load_of(name, routed, inside).double() / (K * inside.sum())
                    total = total + inside.sum() / counted.sum() * EXPERTS * (f * p[inside].mean(0)).sum()
                continue
            pooled = known[name] if isinstance(known, dict) else known
            load = routed.load if scope == "micro_batch" else sum(self.routed[other][name].load for other in pooled)
            total = total + EXPERTS * (load.double() / load.sum() * p[counted].mean(0)).sum()
        return COEFFICIENT * total

    def _load_of(self, name: str, routed: Routed, inside: Tensor) -> Tensor:
        load = torch.zeros(EXPERTS, dtype=torch.int64)
        chosen = self.scores(routed.logits).detach() + self.biases.get(name, torch.zeros(EXPERTS)).double()
        for token in inside.nonzero().flatten().tolist():
            for expert in chosen[token].topk(K).indices.tolist():
                load[expert] += 1
        return load

    def gradients(self, loss: Tensor, routers_only: bool = True) -> dict[str, Tensor]:
        wanted = {n: p for n, p in self.model.named_parameters() if "router" in n or not routers_only}
        found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, retain_graph=True)
        pairs = zip(wanted, found, strict=True)
        return {n: torch.zeros_like(wanted[n]) if g is None else g for n, g in pairs}


def moved(biases: dict[str, Tensor], load: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """The sign rule, centred, by plain loops in float64."""
    after = {}
    for name, counts in load.items():
        numbers = counts.tolist()
        signs = [(sum(numbers) > EXPERTS * n) - (sum(numbers) < EXPERTS * n) for n in numbers]
        mean = sum(signs) / EXPERTS
        before = biases[name].double().tolist()
        after[name] = torch.tensor([b + rate * (s - mean) for b, s in zip(before, signs, strict=True)]).double()
    return after


def distance(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all together, relative, by norm."""
    assert ours.keys() == expected.keys(), (sorted(ours), sorted(expected))
    difference = sum(float((ours[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (difference / sum(float(value.double().square().sum()) for value in expected.values())) ** 0.5
