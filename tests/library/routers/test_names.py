"""Names of modules in the plain model, whatever wraps it."""

import pytest
import torch
from block_net import block_net
from peft import LoraConfig, LoraModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from equipoise.routers.names import named_modules

LORA = LoraConfig(r=2, target_modules=["out"], target_parameters=["gate.weight"])
TRAINED_IN_FULL = LoraConfig(r=2, target_modules=["out"], modules_to_save=["gate"])


class _FSDP1(nn.Module):
    """As FullyShardedDataParallel, which needs a GPU, holds the module that it runs."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module


class _Engine(nn.Module):
    """A wrapper of another library."""

    def __init__(self, module):
        super().__init__()
        self.module, self.extra = module, nn.Linear(1, 1)


class _Vision(nn.Module):
    def __init__(self, language):
        super().__init__()
        self.language = language


def _blocks(wrap):
    def wrapped(net):
        for index, block in enumerate(net.blocks):
            net.blocks[index] = wrap(block)
        return net

    return wrapped


def _gates(wrap):
    def wrapped(net):
        for block in net.blocks:
            block.gate = wrap(block.gate)
        return net

    return wrapped


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "none": lambda net: net,
    "compile": torch.compile,
    "ddp of compile": lambda net: nn.parallel.DistributedDataParallel(torch.compile(net)),
    "compile of ddp": lambda net: torch.compile(nn.parallel.DistributedDataParallel(net)),
    "average": AveragedModel,
    "engine": _Engine,
    "blocks compiled": _blocks(torch.compile),
    "blocks checkpointed and compiled": _blocks(lambda block: torch.compile(checkpoint_wrapper(block))),
    "gates checkpointed": _gates(checkpoint_wrapper),
    "fsdp1": lambda net: _FSDP1(_blocks(_FSDP1)(net)),
    "lora": lambda net: get_peft_model(net, LORA),
    "lora called otherwise": lambda net: get_peft_model(net, LORA, adapter_name="mine"),
    "lora without PeftModel": lambda net: LoraModel(net, LORA, "default"),
    "lora injected": lambda net: inject_adapter_in_model(LORA, net),
    "trained in full": lambda net: get_peft_model(net, TRAINED_IN_FULL, adapter_name="mine"),
    "compile of lora of checkpointed": lambda net: torch.compile(
        get_peft_model(_blocks(checkpoint_wrapper)(net), LORA)
    ),
}


@pytest.mark.parametrize("is_part", [False, True], ids=["whole", "part"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapper_changes_no_name_and_no_parent(wrapper, is_part):
    plain = block_net()
    kinds = {name: type(module) for name, module in plain.named_modules()}
    wrapped = WRAPPERS[wrapper](plain)
    whole = ""  # the name of the model that is wrapped
    if wrapper == "engine":  # what an unknown library wraps is known at the top only
        whole = "module"
    elif is_part:
        wrapped, whole = _Vision(wrapped), "language"
    named = {name.removeprefix("language."): (module, parent) for name, module, parent in named_modules(wrapped)}
    for name, kind in kinds.items():
        module, parent = named[name or whole]
        assert type(module) is kind, name
        if "." in name:
            assert parent is named[name.rpartition(".")[0]][0]
    assert all("lora" not in name and "modules_to_save" not in name for name in named)


def test_names_of_a_model_of_ones_own_stay_whatever_they_are():
    net = nn.ModuleDict({"layers": nn.ModuleDict({"module": nn.Linear(1, 1)}), "base_layer": nn.Linear(1, 1)})
    net["original_module"] = nn.ModuleDict({"model": nn.Linear(1, 1)})
    names = [name for name, _, _ in named_modules(net)]
    expected = [name for name, _ in net.named_modules()]
    assert names == expected and "layers.module" in names and "original_module.model" in names


def test_a_module_that_is_used_twice_has_the_first_name():
    shared = nn.Linear(1, 1)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Linear(1, 1))})
    assert [name for name, _, _ in named_modules(net)] == ["", "a", "b", "b.1"]


def test_the_copy_that_runs_has_the_name():
    net = block_net()
    originals = [block.gate for block in net.blocks]
    model = get_peft_model(net, TRAINED_IN_FULL, adapter_name="first")
    model.add_adapter("second", TRAINED_IN_FULL)

    def gates():
        return [module for name, module, _ in named_modules(model) if name.endswith("gate")]

    wrappers = [block.gate for block in net.blocks]
    for adapter in ("second", "first"):
        model.set_adapter(adapter)
        assert gates() == [wrapper.modules_to_save[adapter] for wrapper in wrappers]
    with model.disable_adapter():
        assert gates() == originals
    called = []
    for module in (*originals, *(copy for wrapper in wrappers for copy in wrapper.modules_to_save.values())):
        module.register_forward_hook(lambda module, *_: called.append(module))
    model(torch.randint(3, 32, (2, 5)))
    assert called == gates()
