"""A tiny model of OLMo-core under its own trainer on a CPU, and what must come out, in float64 and plain loops."""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from frameworks.float64 import MicroBatch, Reference, errors
from olmo_core.config import DType
from olmo_core.data.data_loader import DataLoaderBase
from olmo_core.nn.transformer import TransformerConfig
from olmo_core.ops import moe as ops
from olmo_core.optim import AdamWConfig
from olmo_core.train import Duration, TrainerConfig
from olmo_core.train.callbacks import Callback
from olmo_core.train.train_module import TransformerDataParallelConfig, TransformerTrainModuleConfig

from equipoise.integrations.olmo_core import EquipoiseCallback

VOCABULARY, LENGTH, EXPERTS = 32, 12, 8
COLUMNS = torch.arange(LENGTH)


# ---- its experts, whose copies are kernels for a GPU ----


def _gather(x, indices, bin_ids, bins, top_k):
    return x[indices.long() // top_k]


def _scatter(x, indices, bin_ids, weights, bins, top_k):
    indices = indices.long()
    if weights is not None:
        x = x * weights.reshape(-1)[indices][:, None].to(x.dtype)
    return torch.zeros_like(x).index_copy(0, indices, x).view(-1, top_k, x.shape[-1]).sum(1)


def use_plain_copies():
    ops.gather, ops.scatter = _gather, _scatter


# ---- model, data, trainer ----


def make_model(gamma=1e-3, k=2, function="softmax", loss=None, z_loss=None, normalise=None, layers=2):
    use_plain_copies()
    torch.manual_seed(0)
    config = TransformerConfig.llama_like_moe(
        d_model=16,
        vocab_size=VOCABULARY,
        n_layers=layers,
        n_heads=2,
        num_experts=EXPERTS,
        top_k=k,
        expert_hidden_size=8,
        dropless=True,
        lb_loss_weight=loss,
        z_loss_weight=z_loss,
        attn_backend="torch",
    )
    router = config.block.feed_forward_moe.router
    router.bias_gamma, router.gating_function, router.normalize_expert_weights = gamma, function, normalise
    return config.build(init_device="cpu")


def routers_of(model):
    names = [name for name, module in model.named_modules() if hasattr(module, "get_expert_logits")]
    return {name.replace("_checkpoint_wrapped_module.", ""): model.get_submodule(name) for name in names}


def make_batches(steps, rows=4, rank=0, lengths=None, seed=0):
    """Batches of one rank; with ``lengths``, by step, the numbers of tokens in each row that are no padding."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    batches = []
    for step in range(steps):
        batch = {"input_ids": torch.randint(VOCABULARY, (rows, LENGTH), generator=generator)}
        if lengths is not None:
            batch["attention_mask"] = (torch.tensor(lengths[step])[:, None] > COLUMNS).float()
        batches.append(batch)
    return batches


class Loader(DataLoaderBase):
    """Gives batches that were made before; each rank its own."""

    def __init__(self, batches, folder):
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        size = world * batches[0]["input_ids"].numel()
        super().__init__(work_dir=folder, global_batch_size=size, dp_world_size=world, dp_rank=rank)
        self.batches = batches

    @property
    def total_batches(self):
        return len(self.batches)

    def state_dict(self):
        return {"batches_processed": self.batches_processed}

    def load_state_dict(self, state):
        self.batches_processed = state["batches_processed"]

    def reshuffle(self, epoch=None, **kwargs):
        self._epoch = epoch or 1

    def _iter_batches(self):
        for batch in self.batches[self.batches_processed :]:
            yield dict(batch)

    def get_mock_batch(self):
        """For the trainer's dry run."""
        return {name: value.clone() for name, value in self.batches[0].items()}


class Recorder(Callback):
    """Keeps, by step, gradients before the optimizer's step, and after it loads, biases and tokens."""

    def __init__(self):
        self.gradients, self.loads, self.biases, self.tokens, self.logged = [], [], [], [], {}

    def pre_optim_step(self):
        parameters = self.trainer.train_module.model.named_parameters()
        self.gradients.append({plain_name(n): whole(p.grad).clone() for n, p in parameters if p.grad is not None})

    def post_train_batch(self):
        callback = self.trainer.callbacks.get("equipoise")
        if callback is not None:
            self.loads.append(callback.balance.load)
            self.biases.append(dict(callback.balance.biases))
            self.tokens.append(callback.balance.metrics().get("tokens"))

    def log_metrics(self, step, metrics):
        self.logged[step] = dict(metrics)


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def plain_name(name):
    return name.replace("_checkpoint_wrapped_module.", "")


def make_parts(model, batches, folder, rows=2, lr=0.0, steps=None, wrapper=None, optim=None, trainer=None, **options):
    """A train module whose micro-batches have ``rows`` rows, a trainer's config, and a data loader."""
    if wrapper is not None:
        options["dp_config"] = TransformerDataParallelConfig(name=wrapper, reduce_dtype=DType.float32)
    module = TransformerTrainModuleConfig(
        rank_microbatch_size=rows * LENGTH,
        max_sequence_length=LENGTH,
        optim=optim or AdamWConfig(lr=lr),
        **options,
    ).build(model, device=torch.device("cpu"))
    duration = Duration.epochs(1) if steps is None else Duration.steps(steps)
    config = TrainerConfig(save_folder=str(folder), max_duration=duration, metrics_collect_interval=1)
    for name, value in (trainer or {}).items():
        setattr(config, name, value)
    return module, config, Loader(batches, folder)


def make_trainer(model, batches, folder, strategy, callback=None, **options):
    """A trainer, and its recorder. Without a strategy it has no callback of ours."""
    module, config, loader = make_parts(model, batches, folder, **options)
    if strategy is not None:
        config = config.with_callback("equipoise", callback or EquipoiseCallback(strategy))
    trainer = config.build(module, loader)
    recorder = Recorder()
    trainer.add_callback("recorder", recorder)
    return trainer, recorder


def train(model, batches, strategy, **options):
    """The recorder of a training, and its callback."""
    with tempfile.TemporaryDirectory() as folder:
        options.setdefault("trainer", {"no_checkpoints": True})
        trainer, recorder = make_trainer(model, batches, Path(folder), strategy, **options)
        trainer.fit()
        return recorder, trainer.callbacks.get("equipoise")


# ---- what must come out ----


class OlmoReference(Reference):
    def steer(self, router, bias):
        router.bias_gamma, router.score_bias = 1.0, bias

    def weight(self, part, rank, ranks):
        """Its share of the rank's tokens; the mean over ranks."""
        return part.mask.sum() / sum(other.mask.sum() for other in rank) / len(ranks)


def micro_batches(batch, rows=2, mask_name="attention_mask"):
    ids = batch["input_ids"]
    mask = batch.get(mask_name, torch.ones_like(ids)) != 0
    sequences = torch.arange(len(ids))[:, None].expand_as(ids).clone()
    for row, lengths in enumerate(batch.get("doc_lens", [])):
        start = 0
        for length in lengths.tolist():
            sequences[row, start : start + length] = 1000 * row + start
            start += length
    return [MicroBatch(*part) for part in zip(ids.split(rows), mask.split(rows), sequences.split(rows), strict=True)]


def expected(
    model, batches_by_rank, rate, coefficient=10.0, scope="micro_batch", mask_name="attention_mask", rows=2, **options
):
    """By step, what must come out of a training whose weights do not move."""
    reference = OlmoReference(model, routers_of, EXPERTS, **options)
    by_rank = ([micro_batches(batch, rows, mask_name) for batch in batches] for batches in batches_by_rank)
    return [reference.window(list(ranks), rate, coefficient, scope) for ranks in zip(*by_rank, strict=True)]


def distances(recorder, plain, windows):
    return errors(recorder.gradients, plain.gradients, windows, lambda name: "router" in name)
