"""Small trainings under ``lightning.Trainer``, in one process and on ranks."""

import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any

import lightning
import torch
import torch.distributed as dist
from plain_model import BOTH, Batch, PlainNet, batches
from torch import Tensor
from torch.utils.data import DataLoader

from equipoise.integrations.lightning import BalanceCallback

LR = 0.1
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Module(lightning.LightningModule):
    """Knows nothing of balancing."""

    def __init__(self, recomputes: str | None = None):
        super().__init__()
        self.model = PlainNet(recomputes=recomputes)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), lr=LR)

    def training_step(self, batch: Batch, batch_index: int) -> Any:
        return self.model(**batch)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        self.log("validation_loss", self.model(**batch), batch_size=1)


class Watch(lightning.Callback):
    """Records the gradient of every step, and what the balance holds after it."""

    def __init__(self, callback: BalanceCallback):
        self.callback = callback
        self.gradients: list[dict[str, Tensor]] = []
        self.biases: list[dict[str, Tensor]] = []
        self.loads: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.model.named_parameters()
        self.gradients.append({name: _full(p.grad) for name, p in named if p.grad is not None})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        balance = self.callback.balance
        while balance is not None and balance.num_windows > len(self.biases):  # several, if some were loaded
            self.biases.append(balance.biases)
            self.loads.append(balance.load)


def _full(gradient: Any) -> Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def loader(data: Sequence[Any]) -> DataLoader[Any]:
    return DataLoader(list(data), batch_size=None)  # type: ignore[arg-type]


def trainer(callbacks: Sequence[Any], **options: Any) -> lightning.Trainer:
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    standard = dict(accelerator="cpu", devices=1, max_epochs=1, use_distributed_sampler=False)
    return lightning.Trainer(callbacks=list(callbacks), **(standard | quiet | options))


def fit(
    data: Sequence[Any], *, module: Any = None, balancing: str = BOTH, validation: Any = None, **options: Any
) -> tuple[Any, BalanceCallback, Watch]:
    """Trains a new module, or ``module``."""
    module = Module() if module is None else module
    callback = BalanceCallback(balancing)
    watch = Watch(callback)
    callbacks = [callback, watch, *options.pop("callbacks", ())]
    resume = options.pop("ckpt_path", None)
    trainer(callbacks, **options).fit(module, loader(data), validation and loader(validation), ckpt_path=resume)
    return module, callback, watch


# ---- on ranks ----


class Sharded(Module):
    """FSDP2."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if not hasattr(self.model, "unshard"):
            fully_shard(self.model.blocks[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class TwoForwards(Module):
    """As for a chosen and a rejected answer: one loss of two forwards. DDP calls the LightningModule once."""

    def training_step(self, batch: Batch, batch_index: int) -> Any:
        return self.model(**batch) + self.model(**batches(1, seed=7 + batch_index)[0])


STRATEGIES = ("ddp", "fsdp2")


def _options(name: str) -> tuple[Module, dict[str, Any]]:
    if name == "ddp":
        return Module(), dict(devices=2, strategy="ddp")
    from lightning.pytorch.strategies import ModelParallelStrategy

    return Sharded(), dict(devices=2, strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1))


def _resumed(name: str, data: Sequence[Batch], folder: str) -> tuple[Any, ...]:
    """Two windows, and one more after a checkpoint."""
    module, options = _options(name)
    _, callback, _ = fit(data[:2], module=module, **options)
    saver = trainer([callback], **_options(name)[1])
    saver.fit(module, loader(data[:2]))
    saver.save_checkpoint(f"{folder}/{name}.ckpt")
    module, options = _options(name)
    _, resumed, watch = fit(data[:1], module=module, max_epochs=2, ckpt_path=f"{folder}/{name}.ckpt", **options)
    results = callback.balance.biases, watch.biases[0], watch.gradients[0], resumed.balance.num_windows
    callback.detach()
    resumed.detach()
    return results


def everything(rank: int, folder: str) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29517", "NODE_RANK": "0"}  # the process group exists
    data = batches(8)[rank::2]
    results: dict[str, Any] = {}
    for name in STRATEGIES:
        for accumulated in (1, 3):
            module, options = _options(name)
            _, callback, watch = fit(data, module=module, accumulate_grad_batches=accumulated, **options)
            results[f"{name} {accumulated}"] = watch.gradients, watch.biases, watch.loads
            callback.detach()
        results[f"{name} resumed"] = _resumed(name, data, folder)
    _, callback, _ = fit(data[:1], module=TwoForwards(), devices=2, strategy="ddp")
    results["two forwards"] = callback.balance.metrics()["tokens"], int(callback.balance.num_tokens)
    dist.barrier()
    return results
