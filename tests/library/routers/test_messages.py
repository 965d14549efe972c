"""Each refusal of a router says what must hold, what came, and the one thing to do about it."""

import importlib
import logging
import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import equipoise
from equipoise import EquipoiseError, attach
from equipoise.nn import MoE
from equipoise.routers.find import OLDEST_TRANSFORMERS, unknown_routers
from equipoise.routers.frameworks import FRAMEWORKS
from equipoise.routers.outputs import CONTRACT

DIM, EXPERTS, K = 16, 8, 2
GATE_AND_TOP_K = "A router has the gate and the top-k in one module"


class TopKRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM, generator=torch.Generator().manual_seed(0)))

    def choose(self, x):
        logits = F.linear(x.reshape(-1, DIM).float(), self.weight.float())
        weights, expert_ids = logits.sigmoid().topk(K, -1)
        return logits, weights, expert_ids

    def forward(self, x):
        return self.choose(x)


class Block(nn.Module):
    """Takes the weights from outputs in any order: an adapter changes nothing in the block."""

    def __init__(self, router):
        super().__init__()
        self.router = router

    def forward(self, x):
        outputs = [value for value in self.router(x) if value is not None and value.is_floating_point() and value.dim()]
        weights = next(value for value in outputs if value.shape[-1] == K)
        return x * weights.sum(-1).view(*x.shape[:-1], 1)


def _refusal(router, strategy="loss-free"):
    with pytest.raises(EquipoiseError) as caught:
        attach(nn.Sequential(Block(router)), strategy)
    message = str(caught.value)
    assert message.startswith("a model must hold a router that can be proven: 0.router")
    return message


# ---- what the forward returns ----


class IdsFirst(TopKRouter):
    """As DeepSeek's and Kimi's remote code."""

    def forward(self, x):
        _, weights, expert_ids = self.choose(x)
        return expert_ids, weights


class IdsWeightsLoss(TopKRouter):
    def forward(self, x):
        _, weights, expert_ids = self.choose(x)
        return expert_ids, weights, torch.zeros(())


class IdsWeightsLogits(TopKRouter):
    """As Ling's remote code."""

    def forward(self, x):
        logits, weights, expert_ids = self.choose(x)
        return expert_ids, weights, logits


class WeightsIdsLogits(TopKRouter):
    def forward(self, x):
        logits, weights, expert_ids = self.choose(x)
        return weights, expert_ids, logits


class FourOutputs(TopKRouter):
    def forward(self, x):
        logits, weights, expert_ids = self.choose(x)
        return weights, expert_ids, None, logits


class AList(TopKRouter):
    def forward(self, x):
        return list(self.choose(x))


class LinearGate(nn.Module):
    """The logits are not among its outputs. They are what its only layer computes."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(DIM, EXPERTS)

    def forward(self, x):
        scores = self.gate(x.reshape(-1, DIM)).softmax(-1)
        weights, expert_ids = scores.topk(K, -1)
        return expert_ids, weights


class TwoLayers(LinearGate):
    def __init__(self):
        super().__init__()
        self.before = nn.Linear(DIM, DIM)

    def forward(self, x):
        return super().forward(x + self.before(x))


ORDERS = {
    LinearGate: "(expert_ids, weights)",
    IdsFirst: "(expert_ids, weights)",
    IdsWeightsLoss: "(expert_ids, weights, _)",
    IdsWeightsLogits: "(expert_ids, weights, logits)",
    WeightsIdsLogits: "(weights, expert_ids, logits)",
    FourOutputs: "(weights, expert_ids, _, logits)",
    AList: "(logits, weights, expert_ids) in a list",
}


@pytest.mark.parametrize("router", ORDERS)
def test_another_order_of_outputs_is_recognised_and_the_adapter_that_is_shown_works(router):
    message = _refusal(router())
    assert f"does not return (logits, weights, expert_ids) but {ORDERS[router]}. " in message
    assert "router_kind" not in message
    lines = [line for line in message.partition(":\n")[2].splitlines() if line.startswith("    ")]
    twin = type(router.__name__, (router,), {"__module__": "user"})  # the class that the user adapts
    scope = {router.__name__: twin, "F": F, "equipoise": equipoise}
    exec("\n".join(line[4:] for line in lines), scope)
    adapted = scope.get(f"Adapted{router.__name__}", twin)
    balance = attach(model := nn.Sequential(Block(adapted())), "loss-free:rate=0.1+lbl")
    (model(torch.randn(2, 5, DIM)).sum() + balance.loss()).backward()
    balance.step()
    assert balance.load["0.router"].sum() == 20 and all(p.grad.any() for p in model[0].router.parameters())


def test_no_adapter_is_shown_where_the_logits_are_not_known():
    message = _refusal(TwoLayers())
    assert "Return (logits, weights, expert_ids) from its forward" in message and "class Adapted" not in message


class ShortIds(TopKRouter):
    def forward(self, x):
        logits, weights, expert_ids = self.choose(x)
        return logits, weights, expert_ids.int()


class LogitsOnly(TopKRouter):
    def forward(self, x):
        return self.choose(x)[0]


class Dictionary(TopKRouter):
    def forward(self, x):
        return {"weights": self.choose(x)[1]}


class NoIds(TopKRouter):
    def forward(self, x):
        logits, weights, _ = self.choose(x)
        return logits, weights


class Cropped(TopKRouter):
    def forward(self, x):
        return tuple(value[:-1] for value in self.choose(x))


class NeedsTypes(TopKRouter):
    def forward(self, x, token_types):
        return self.choose(x)


class Vector(nn.Module):
    """Called a router by its base; it has no matrix."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(EXPERTS))


class VectorRouter(Vector):
    def forward(self, x):
        return x


class Raises(TopKRouter):
    def forward(self, x):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (64x16 and 4x8)")


@pytest.mark.parametrize(
    ("router", "reason", "remedy"),
    [
        (ShortIds, "the ids of its experts must be int64, and are torch.int32", "Convert them, ids.long()."),
        (LogitsOnly, "one tensor of shape (64, 8) for 64 tokens", GATE_AND_TOP_K),
        (Dictionary, "but a dict", GATE_AND_TOP_K),
        (NoIds, "but 2 outputs: (64, 8), (64, 2)", GATE_AND_TOP_K),
        (Cropped, "gives 63 rows for 64 tokens", GATE_AND_TOP_K),
        (NeedsTypes, "its forward needs token_types beside the tokens", GATE_AND_TOP_K),
        (VectorRouter, "it has no matrix of weights", GATE_AND_TOP_K),
        (Raises, "RuntimeError: mat1 and mat2 shapes cannot be multiplied (64x16 and 4x8), on random", GATE_AND_TOP_K),
    ],
)
def test_what_came_is_shown_and_the_contract_is_told(router, reason, remedy):
    message = _refusal(router())
    assert reason in message and remedy in message
    assert message.count("where=") == 0, "one remedy"


# ---- where the forward fails ----


class NotInTraining(TopKRouter):
    """As DeepSeek-V3's remote code."""

    def forward(self, x):
        if self.training:
            raise AssertionError("noaux_tc is for inference")
        return self.choose(x)


def test_an_assertion_on_training_is_shown_as_it_is():
    message = _refusal(NotInTraining())
    assert "its forward raised AssertionError: noaux_tc is for inference, in training mode only" in message
    assert "call eval() before attach" in message and "needs" not in message
    balance = attach(model := nn.Sequential(Block(NotInTraining())).eval(), "frozen")
    with balance.measuring() as load:
        model(torch.randn(2, 5, DIM))
    assert load["0.router"].sum() == 20


def test_quantised_weights_are_named():
    class PackedRouter(TopKRouter):
        def __init__(self):
            super().__init__()
            packed = torch.zeros(EXPERTS * DIM // 2, 1, dtype=torch.uint8)
            self.weight = nn.Parameter(packed, requires_grad=False)

    message = _refusal(PackedRouter())
    assert "its weights are quantised, and its forward raised RuntimeError: mat1 and mat2" in message
    assert message.endswith("Attach before the weights are quantised, or keep routers out of the quantisation.")


def test_an_old_transformers_is_named_with_the_oldest_that_is_supported(monkeypatch):
    import transformers

    class OldSparseMoeBlock(nn.Module):
        """A gate that is a plain linear layer, as before Transformers 5."""

        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(DIM, EXPERTS), nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(20))

        def forward(self, x):
            return x * self.gate(x).softmax(-1).topk(K).values.sum(-1, keepdim=True)

    class OldRouter(LogitsOnly):
        pass

    for cls in (OldSparseMoeBlock, OldRouter):
        cls.__module__ = "transformers.models.old.modeling_old"
    models = nn.Sequential(OldSparseMoeBlock()), nn.Sequential(OldRouter())
    for model in models:
        with pytest.raises(EquipoiseError, match=GATE_AND_TOP_K):
            attach(model)
    monkeypatch.setattr(transformers, "__version__", "4.57.1")
    for model in models:
        with pytest.raises(
            EquipoiseError, match=r"Transformers 4\.57\.1, and the oldest.*5\.23.*Install transformers>=5"
        ):
            attach(model)


def test_the_oldest_transformers_is_that_of_the_package():
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    extras = tomllib.loads(text)["project"]["optional-dependencies"]
    asked = {entry for entries in extras.values() for entry in entries if entry.startswith("transformers")}
    assert (
        all(entry.startswith(f"transformers>={'.'.join(map(str, OLDEST_TRANSFORMERS))},") for entry in asked) and asked
    )


@pytest.mark.filterwarnings("ignore")  # of FSDP1, which is deprecated
def test_weights_that_fsdp1_flattened_are_named():
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for block in (MoE(DIM, 8, EXPERTS, K), Block(TopKRouter())):
            model = FullyShardedDataParallel(
                nn.Sequential(block), None, ShardingStrategy.NO_SHARD, device_id=torch.device("cpu")
            )
            with pytest.raises(EquipoiseError, match="FullyShardedDataParallel has flattened its weights.*fully_shard"):
                attach(model, "loss-free")
    finally:
        dist.destroy_process_group()


# ---- no router at all ----


class SparseMoeBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(DIM, EXPERTS), nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(20))

    def forward(self, x):
        return x * self.gate(x).softmax(-1).topk(K).values.sum(-1, keepdim=True)


def test_a_block_without_a_router_module_is_told_the_contract(caplog):
    with pytest.raises(EquipoiseError, match="holds SparseMoeBlock, and no module that returns a choice") as caught:
        attach(nn.Sequential(SparseMoeBlock()))
    assert CONTRACT in str(caught.value)
    for rule in ("one module", "returns (logits", "multiplies the outputs", "equipoise.nn.Router"):
        assert rule in CONTRACT
    (unknown,) = unknown_routers(nn.Sequential(SparseMoeBlock(), Block(TopKRouter())))
    assert CONTRACT in unknown


def test_a_block_that_does_not_use_the_weights_is_told_what_reaches_them(caplog):
    class OwnWeights(Block):
        is_mended = False

        def forward(self, x):
            _, weights, _ = self.router(x)
            return x + 0 * weights.sum() if self.is_mended else x

    model = nn.Sequential(nn.Linear(DIM, DIM), OwnWeights(TopKRouter()))
    balance = attach(model, "lbl")
    for model[1].is_mended in (False, True):
        caplog.clear()
        balance._notices._said.clear()
        with caplog.at_level(logging.WARNING, logger="equipoise"):
            (model(torch.randn(2, 5, DIM)).sum() + balance.loss()).backward()
            balance.step()
        assert ["0 * weights.sum()" in record.message for record in caplog.records] == [True] * (not model[1].is_mended)
    assert model[1].router.weight.grad.any()


# ---- frameworks ----


class OfFramework(LogitsOnly):
    __module__ = "megatron.core.transformer.moe.router"


def test_a_refused_model_of_a_framework_names_it_the_tested_version_and_the_import():
    message = _refusal(OfFramework())
    assert message.endswith(
        "The model is of megatron-core of unknown version; 0.19.2 was tested. Use from equipoise.integrations.megatron "
        "import attach: docs/how-to/megatron.md says what is refused there."
    )
    assert "was tested" not in _refusal(LogitsOnly())


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_what_is_said_of_a_framework_holds(name):
    framework = FRAMEWORKS[name]
    module = importlib.import_module(framework.module)
    assert {adapter.framework for adapter in module.ROUTER_ADAPTERS.values()} == {
        f"{framework.package} {framework.tested}"
    }
    root = Path(__file__).parents[3]
    page = framework.module.rpartition(".")[2]
    assert (root / "docs" / "how-to" / f"{page}.md").exists()
    pins = (root / "tests" / "frameworks" / "environments" / f"{page}.txt").read_text()
    assert f"{framework.package}=={framework.tested}" in pins
    if framework.use.startswith("from"):
        try:
            exec(framework.use, {})
        except ImportError as error:
            assert f"is not installed: pip install {framework.package}" in str(error)
