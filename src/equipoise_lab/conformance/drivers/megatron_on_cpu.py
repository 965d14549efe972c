"""Lets Megatron-Core 0.18 and 0.19 run on a CPU: everything that it takes for granted of a GPU, in one place.

Import this before ``megatron``. Nothing here touches a router, a loss or a gradient:

- tensors that it makes on ``cuda`` are made on the CPU, and its optimizers accept parameters that lie there;
- streams, events and synchronisation do nothing;
- random states of a GPU are those of the CPU;
- numbers of tokens that it sends to other ranks become numbers of the host, as when they come from a GPU;
- small functions that it compiles run eagerly, which is faster here;
- what the writers of a checkpoint report comes through a queue of this process: a daemonic one may not start others;
- what it recomputes without keeping the output asks Transformer Engine for no state of 8-bit numbers;
- the last norm of a HybridModel is torch's, as it needs Transformer Engine;
- its LayerNorm accepts sequence parallelism without Transformer Engine. The gradients of its own weights are then those
  of one rank's tokens: no test looks at them;
- Triton, which it imports and does not need here, is a stand-in while it loads.
"""

import contextlib
import importlib.abc
import importlib.machinery
import queue
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["start", "stop"]

# Its modules that write the name of a device, or of a tensor's type, into their source.
_REWRITTEN = (
    "megatron.core.jit",
    "megatron.core.utils",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.transformer.torch_norm",
)
_REPLACED = {
    b"device='cuda'": b"device='cpu'",
    b'device="cuda"': b'device="cpu"',
    b"'torch.cuda.": b"'torch.",
    b".cuda(torch.cuda.current_device())": b"",
    b"jit_fuser = torch.compile": b"jit_fuser = noop_decorator",
    b"assert not config.sequence_parallel": b"assert True",
}


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:  # not from a cache: that of the package holds the unchanged source
        source = self.get_data(self.path)
        for before, after in _REPLACED.items():
            source = source.replace(before, after)
        return compile(source, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in _REWRITTEN:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec is not None and spec.origin is not None
        spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Stream:
    """A stream or an event, which does nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> "_Stream":
        return self

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _patch_torch() -> None:
    cuda: Any = torch.cuda
    the_stream = _Stream()
    cuda.current_device = lambda: torch.device("cpu")
    cuda.current_stream = lambda device=None: the_stream
    cuda.Stream = cuda.Event = _Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.manual_seed = torch.manual_seed
    tensor: Any = torch.Tensor
    tensor.record_stream = lambda self, stream: None


def _without_triton() -> None:
    """Stand-ins for Triton while Megatron loads: its kernels are not called here."""
    if importlib.util.find_spec("triton") is not None:
        return
    for name in ("triton", "triton.language"):
        sys.modules.setdefault(name, _StandIn(name))


class _StandIn(ModuleType):
    __path__: Any = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return SimpleNamespace()


_patch_torch()
sys.meta_path.insert(0, _Finder())

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.models.hybrid import hybrid_block  # noqa: E402
from megatron.core.tensor_parallel import random as megatron_random  # noqa: E402
from megatron.core.transformer.moe import token_dispatcher  # noqa: E402
from megatron.core.transformer.torch_norm import WrappedTorchNorm  # noqa: E402


def start(**sizes: Any) -> None:
    """Megatron's process groups, on top of those of torch. ``sizes``: as of its ``initialize_model_parallel``.

    Without a process group of torch, one of one rank is made. Megatron's groups of before end.
    """
    stop()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(**sizes)
    megatron_random.model_parallel_cuda_manual_seed(0)


def stop() -> None:
    parallel_state.destroy_model_parallel()


def _set_rng_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(state)


megatron_random._set_cuda_rng_state = _set_rng_state
# Of a GPU it checks that the random state of the CPU does not change meanwhile; here they are one.
megatron_random.CudaRNGStatesTracker.fork = lambda self, name=None: contextlib.nullcontext()


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor


token_dispatcher.maybe_move_tensor_to_cpu = _to_host
filesystem_async._results_queue = queue.Queue()
hybrid_block.TENorm = WrappedTorchNorm


class _WithoutFP8(megatron_random.CheckpointWithoutOutput):
    def __init__(self, fp8: Any = None):
        super().__init__(None)


megatron_random.CheckpointWithoutOutput = tensor_parallel.CheckpointWithoutOutput = _WithoutFP8
