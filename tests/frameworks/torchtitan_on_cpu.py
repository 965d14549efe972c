"""torchtitan's Trainer on a CPU: tiny models, data from a seed, and what has to be replaced for that.

Before the Trainer is imported, these are replaced:

- the device, the memory monitor, and a barrier with device ids;
- FlexAttention, which has no backward on a CPU;
- the reduction of FSDP2 that scales, which gloo has not;
- the experts: torchtitan computes them in bfloat16. Here they keep the precision of the tokens, so that a model in
  float32 can be compared with one in float64;
- the steps of pipeline schedules: torch 2.13 does not know the arguments with which torchtitan 0.3.0 calls them.
"""

import dataclasses
import inspect
import logging
import os
import types
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torchtitan.tools.utils
from torch import Tensor
from torch.distributed.pipelining import schedules

torchtitan.tools.utils.device_type, torchtitan.tools.utils.device_module = "cpu", torch.cpu

import torchtitan.components.metrics as titan_metrics  # noqa: E402
import torchtitan.distributed.fsdp as titan_fsdp  # noqa: E402
import torchtitan.distributed.utils as titan_distributed  # noqa: E402
import torchtitan.models.deepseek_v3 as deepseek_v3  # noqa: E402
import torchtitan.models.deepseek_v3.parallelize as titan_deepseek_parallelize  # noqa: E402
import torchtitan.models.qwen3 as qwen3  # noqa: E402
import torchtitan.models.qwen3.parallelize as titan_qwen3_parallelize  # noqa: E402
import torchtitan.trainer as titan_trainer  # noqa: E402
from torchtitan.components.checkpointer import CheckpointManager  # noqa: E402
from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss, CrossEntropyLoss  # noqa: E402, F401
from torchtitan.components.optimizer import default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config.configs import CompileConfig, ParallelismConfig, TrainingConfig  # noqa: E402
from torchtitan.models.common import ComplexRoPE, CosSinRoPE, Embedding, Linear, RMSNorm  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts, MoE  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

logging.getLogger("torchtitan").setLevel(logging.ERROR)

VOCABULARY, DIM, EXPERTS, K, LENGTH = 48, 16, 8, 2, 16
MTP_SCALE = 0.3


class _Monitor:
    device_name, device_capacity_gib = "cpu", 1.0

    def __init__(self, *_: Any):
        pass

    def get_peak_stats(self) -> Any:
        return titan_metrics.DeviceMemStats(0, 0, 0, 0, 0, 0)

    def reset_peak_stats(self) -> None:
        pass


def _experts(self: Any, x: Tensor, num_tokens: Tensor) -> Tensor:
    w1, w2, w3 = (
        weight.to_local() if hasattr(weight, "to_local") else weight
        for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD)
    )
    expert = torch.repeat_interleave(torch.arange(len(w1)), num_tokens.to(torch.int64), output_size=len(x))
    rows = torch.zeros_like(x)
    for e in range(len(w1)):
        of_expert = (expert == e).to(x.dtype)[:, None]
        hidden = torch.nn.functional.silu(x @ w1[e].T) * (x @ w3[e].T)
        rows = rows + of_expert * (hidden @ w2[e].T)
    return rows


_do_not_divide = titan_fsdp.disable_fsdp_gradient_division


def _sum_gradients(model: Any) -> None:
    _do_not_divide(model)
    for module in model.modules():
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)


def _step_of_micro_batches(
    self: Any,
    *,
    arg_mbs: Any = None,
    kwarg_mbs: Any = None,
    target_mbs: Any = None,
    losses: Any = None,
    loss_kwargs: Any = None,
    return_outputs: bool = False,
) -> None:
    for stage in self._stages if hasattr(self, "_stages") else [self._stage]:
        stage.has_backward = self._has_backward
        stage.clear_runtime_states()
    self._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs=loss_kwargs)


if "kwarg_mbs" not in inspect.signature(schedules.PipelineScheduleSingle.step).parameters:
    schedules.PipelineScheduleSingle.step = schedules.PipelineScheduleMulti.step = _step_of_micro_batches


def _values(self: Any, q_BLNH: Tensor, k_BLNH: Tensor, v_BLNH: Tensor, **_: Any) -> Tensor:
    return v_BLNH + 0 * (q_BLNH + k_BLNH)[..., : v_BLNH.shape[-1]]


@contextmanager
def attention_without_context() -> Any:
    """Each token sees itself only. Context parallel attention does not run on a CPU, and this needs none."""
    with ExitStack() as stack:
        stack.enter_context(patch.object(ScaledDotProductAttention, "forward", _values))
        for module in (titan_deepseek_parallelize, titan_qwen3_parallelize):
            stack.enter_context(patch.object(module, "apply_cp_to_forward", lambda *_: None))
        yield


titan_fsdp.disable_fsdp_gradient_division = _sum_gradients
titan_metrics.DeviceMemoryMonitor = _Monitor
titan_distributed.set_pg_timeouts = lambda **_: None
titan_trainer.time = types.SimpleNamespace(perf_counter=titan_trainer.time.perf_counter, sleep=lambda _: None)
deepseek_v3.get_attention_config = qwen3.get_attention_config = lambda _: ScaledDotProductAttention.Config()
OWN_EXPERTS, GroupedExperts.forward = GroupedExperts.forward, _experts


# ---- data ----


def rows_of(seed: int, num_rows: int, kind: str) -> tuple[dict[str, Tensor], Tensor]:
    """A micro-batch, whose tokens are of a part of the vocabulary.

    ``kind``: "full"; "packed", two documents a row that begin with a prompt; "padded", with padding after them; "zipf",
    full, with a few tokens that are frequent.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(VOCABULARY - 12, (1,), generator=generator)  # each micro-batch has tokens of its own
    ids = start + torch.randint(12, (num_rows, LENGTH + 1), generator=generator)
    if kind == "zipf":
        ids = (VOCABULARY * torch.rand(ids.shape, generator=generator) ** 3).long()
    inputs, labels = ids[:, :-1].clone(), ids[:, 1:].clone()
    positions = torch.arange(LENGTH).repeat(num_rows, 1)
    if kind in ("packed", "padded"):
        for row in range(num_rows):
            first, second = 3 + int(torch.randint(4, (1,), generator=generator)), 10 + row % 2
            ends = [first, second, LENGTH] if kind == "padded" else [first, LENGTH]
            begin = 0
            for end in ends:
                positions[row, begin:end] = torch.arange(end - begin)
                labels[row, begin] = IGNORE_INDEX  # a prompt
                begin = end
            if kind == "padded":  # the last document of a row, or the first one, has no label
                padding = slice(second, None) if row % 2 == 0 else slice(first)
                labels[row, padding], inputs[row, padding] = IGNORE_INDEX, 0
    return {"input": inputs, "positions": positions}, labels


class Data(BaseDataLoader):
    """Micro-batches by seed: number n of rank r has the seed 1000 n + r."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        kinds: tuple[str, ...] = ("full",)  # by turns
        infinite: bool = True
        dataset: str = ""

    def __init__(self, config: Any, *, dp_rank: int, local_batch_size: int, **_: Any):
        self.kinds, self.rank, self.num_rows, self.number = config.kinds, dp_rank, local_batch_size, 0

    def __iter__(self) -> Any:
        while True:
            self.number += 1
            kind = self.kinds[(self.number + self.rank) % len(self.kinds)]
            yield rows_of(1000 * self.number + self.rank, self.num_rows, kind)

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


class Tokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any = None, **_: Any):
        self.eos_id = 0

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCABULARY


class NoLoss(BaseLoss):
    """Zero: what is left of the gradient is that of the balancing losses."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Any, *, compile_config: Any = None):
        self.fn = lambda outputs, labels: 0 * outputs.sum()

    def __call__(self, pred: Any, labels: Tensor, global_valid_tokens: Any = None, **_: Any) -> Any:
        outputs = pred if isinstance(pred, list) else [pred]
        return sum(0 * output.sum() for output in outputs), {}


# ---- models ----


def model_config(
    family: str = "deepseek",
    score: str = "softmax",
    num_layers: int = 3,
    num_mtp: int = 0,
    own_rate: float | None = 1e-3,
) -> Any:
    """The config of a model; the first layer of a DeepSeek is dense. ``own_rate``: of torchtitan's own update."""
    common = dict(
        vocab_size=VOCABULARY,
        dim=DIM,
        tok_embeddings=Embedding.Config(
            num_embeddings=VOCABULARY, embedding_dim=DIM, param_init=deepseek_v3._EMBEDDING_INIT
        ),
        norm=RMSNorm.Config(normalized_shape=DIM, param_init=deepseek_v3._NORM_INIT),
        lm_head=Linear.Config(
            in_features=DIM, out_features=VOCABULARY, param_init=deepseek_v3._output_linear_init(DIM)
        ),
    )
    if family == "qwen3":
        layers = qwen3._build_qwen3_moe_layers(
            n_layers=num_layers,
            dim=DIM,
            n_heads=2,
            n_kv_heads=2,
            head_dim=8,
            moe_hidden_dim=16,
            num_experts=EXPERTS,
            top_k=K,
            attn_backend="flex",
            moe_comm_backend="standard",
            rope=CosSinRoPE.Config(dim=8, max_seq_len=64, theta=10000.0),
        )
        return _with_rate(qwen3.Qwen3Model.Config(**common, layers=layers), own_rate)
    layers = deepseek_v3._build_dsv3_layers(
        n_layers=num_layers,
        n_dense_layers=1,
        dim=DIM,
        n_heads=2,
        q_lora_rank=0,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        mscale=1.0,
        dense_hidden_dim=16,
        moe_hidden_dim=16,
        num_experts=EXPERTS,
        num_shared_experts=1,
        router_top_k=K,
        router_score_func=score,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        rope=ComplexRoPE.Config(dim=8, max_seq_len=64, theta=10000.0),
    )
    mtp = deepseek_v3._build_mtp_layers(layers[-1], dim=DIM, num_mtp_layers=num_mtp)
    for layer in mtp:
        for part in (layer.enorm, layer.hnorm, layer.mtp_norm):
            part.param_init = deepseek_v3._NORM_INIT
        layer.eh_proj.param_init = deepseek_v3._LINEAR_INIT
    return _with_rate(deepseek_v3.DeepSeekV3Model.Config(**common, layers=layers, mtp_layers=mtp), own_rate)


def _with_rate(config: Any, rate: float | None) -> Any:
    for _, moe, _, _ in config.traverse(MoE.Config):
        moe.load_balance_coeff = rate
        moe.router.gate.param_init = {"weight": partial(torch.nn.init.normal_, std=0.3)}  # so that scores are not equal
    return config


def trainer_config(
    folder: Any,
    *,
    model: Any = None,
    kinds: tuple[str, ...] = ("full",),
    rows: int = 2,
    accumulation: int = 1,
    steps: int = 3,
    lr: float = 0.0,
    loss: Any = None,
    data_parallel: int = 1,
    checkpointing: Any = None,
    compiled: bool = False,
    **parallelism: Any,
) -> Any:
    """A config of the Trainer. With ``lr=0`` the weights stay, so that a reference needs no optimizer."""
    spec = deepseek_v3.model_registry("debugmodel", attn_backend="flex")
    model = model_config() if model is None else model
    if isinstance(model, qwen3.Qwen3Model.Config):
        spec = dataclasses.replace(spec, parallelize_fn=qwen3.parallelize_qwen3, name="qwen3")
    spec = dataclasses.replace(spec, model=model, state_dict_adapter=None)
    config = Trainer.Config(
        model_spec=spec,
        tokenizer=Tokenizer.Config(),
        dataloader=Data.Config(kinds=kinds),
        optimizer=default_adamw(lr=lr),
        training=TrainingConfig(
            local_batch_size=rows,
            global_batch_size=rows * accumulation * data_parallel,
            seq_len=LENGTH,
            steps=steps,
            max_norm=1e9,
            mixed_precision_param="float32",
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(**parallelism),
        loss=NoLoss.Config() if loss is None else loss,
        dump_folder=str(folder),
        activation_checkpoint=checkpointing,
        compile=CompileConfig(enable=compiled, components=["model"], backend="aot_eager"),
        checkpoint=CheckpointManager.Config(enable=False),
    )
    config.debug.enable_structured_logging = False
    config.debug.seed = 1
    config.lr_scheduler.warmup_steps = 0
    return config


SET_BY_TORCHRUN = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def prepare_process(rank: int = 0, num_ranks: int = 1, port: int = 29571) -> None:
    """Sets what torchrun would set."""
    values = (rank, rank, num_ranks, "127.0.0.1", port)
    os.environ.update(zip(SET_BY_TORCHRUN, map(str, values), strict=True))
