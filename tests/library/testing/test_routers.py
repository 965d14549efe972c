"""Every family and layer conforms. Each known mistake in a model or in the library fails the invariant it breaks."""

from copy import deepcopy
from types import SimpleNamespace

import models
import pytest
import torch
import torch.nn.functional as F
from models import FAMILIES
from torch import nn

import equipoise.attachment
import equipoise.counting.recorder
import equipoise.counting.taps
from equipoise.balance import Balance
from equipoise.counting.biases import Biases
from equipoise.counting.gradient import Losses
from equipoise.counting.masks import Tokens
from equipoise.counting.recorder import Mode, Recorder
from equipoise.counting.taps import Taps
from equipoise.errors import EquipoiseError
from equipoise.nn import MoE
from equipoise.routers import RouterKind
from equipoise.routers.kind import ADDED_SLOT
from equipoise.routers.steering import BiasedTopK
from equipoise.routers.tap import Tap
from equipoise.testing import ROUTER_INVARIANTS, ConformanceError, check_routers
from equipoise.testing.routers._subject import Subject

ALL = set(ROUTER_INVARIANTS)
FACTOR, PADDING = {"factor moves the choice only"}, {"padding is not counted"}
DIM, EXPERTS, VOCAB = 12, 6, 32
IDS = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(0))

every_family = pytest.mark.parametrize("name", sorted(FAMILIES))


# ---- families and layers that conform ----


@every_family
def test_families_conform(name):
    assert set(check_routers(models.family(name))) == ALL


def test_a_family_with_groups_and_a_bias_conforms():
    model = models.family("glm4_moe", n_group=4, topk_group=2)
    for key, slot in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            slot.copy_(0.02 * torch.randn(8, generator=torch.Generator().manual_seed(0)))
    assert set(check_routers(model)) == ALL - FACTOR


def test_a_model_in_16_bits_conforms():
    assert set(check_routers(models.family("qwen3_moe").bfloat16())) == ALL


def test_a_model_that_uses_every_expert_conforms_without_a_loss_gradient():
    assert set(check_routers(models.family("glm4_moe", k=8, layers=1))) == ALL - {"loss gradient"}


@pytest.mark.parametrize("checkpointing", [None, "non_reentrant"])
def test_a_model_with_padding_in_float64_conforms(checkpointing):
    batch = {"input_ids": IDS, "attention_mask": (torch.arange(32).view(2, 16) % 5 > 0).long()}
    assert set(check_routers(models.tiny_lm(checkpointing).double(), batch)) == ALL


def test_a_model_of_two_families_conforms():
    assert set(check_routers(models.tiny_lm(), {"input_ids": IDS})) == ALL


def test_some_layers_of_a_model_conform():
    batch = {"input_ids": IDS}
    for chosen in ("blocks.0.gate", "blocks.1.gate"):
        assert set(check_routers(models.tiny_lm(), batch, where=lambda name, _, chosen=chosen: name == chosen)) == ALL


class Layer(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.moe = MoE(16, hidden=16, num_experts=8, k=2, num_shared=1, **options)
        nn.init.normal_(self.moe.router.weight, std=0.5)

    def forward(self, x):
        return x + self.moe(F.rms_norm(x, x.shape[-1:]))


@pytest.mark.parametrize(
    ("options", "checked"),
    [
        ({}, ALL - PADDING),
        ({"score_function": "softmax", "renormalise": False}, ALL - PADDING),
        ({"score_function": "sqrt_softplus", "capacity_factor": 1.0, "scale": 2.0}, ALL - PADDING),
        ({"num_groups": 4, "top_groups": 2}, ALL - PADDING - FACTOR),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,  # the order of a set differs between processes
)
def test_the_layer_of_the_library_conforms(options, checked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCAB, 16), Layer(**options), Layer(**options))
    assert set(check_routers(model, {"input": IDS})) == checked


def test_the_model_and_the_global_generator_stay_as_they_are():
    model = models.tiny_lm()
    model(IDS).backward()
    modules, state = [type(m) for m in model.modules()], deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    check_routers(model, {"input_ids": IDS})
    assert torch.equal(torch.get_rng_state(), before)
    assert [type(m) for m in model.modules()] == modules and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


# ---- custom models ----


class SlotRouter(nn.Module):
    """Sigmoid scores and a slot, without code of the library."""

    router_kind = RouterKind("sigmoid", "bias")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, DIM) * 0.4)
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, hidden):
        logits = F.linear(hidden.reshape(-1, DIM).float(), self.weight.float())
        return self.faulty(logits) if len(logits) != 64 else self.correct(logits)  # attach tries it with 64 tokens

    def correct(self, logits):
        scores = logits.sigmoid()
        ids = torch.topk(scores + self.bias, 2, dim=-1).indices
        weights = scores.gather(1, ids)
        return logits, weights / weights.sum(-1, keepdim=True), ids

    def faulty(self, logits):
        return self.correct(logits)


class SlotlessRouter(SlotRouter):
    """Softmax scores, no slot."""

    router_kind = RouterKind("softmax", None)

    def __init__(self):
        super().__init__()
        del self.bias

    def correct(self, logits):
        weights, ids = torch.topk(logits.softmax(-1), 2, dim=-1)
        return logits, weights, ids


class Experts(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.gate, self.scale = router(), nn.Parameter(torch.randn(EXPERTS, DIM))

    def forward(self, x):
        _, weights, ids = self.choose(x)
        return x + (self.scale[ids] * weights.to(x.dtype)[..., None]).sum(-2).view_as(x) * x

    def choose(self, x):
        return self.gate(x)


class Model(nn.Module):
    def __init__(self, router=SlotlessRouter, block=Experts):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(VOCAB, DIM), nn.ModuleList(block(router) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)
        self.config = SimpleNamespace(vocab_size=VOCAB)

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(F.rms_norm(x, x.shape[-1:]))
        return SimpleNamespace(logits=self.head(x))


class CalledTwice(Experts):
    def forward(self, x):
        return super().forward(super().forward(x))


@pytest.mark.parametrize(
    ("router", "block"), [(SlotRouter, Experts), (SlotlessRouter, Experts), (SlotRouter, CalledTwice)]
)
def test_a_custom_model_conforms(router, block):
    assert set(check_routers(Model(router, block))) == ALL


class ChoosesAgain(Experts):
    def choose(self, x):
        logits, _, _ = self.gate(x)
        weights, ids = torch.topk(logits.softmax(-1), 2, dim=-1)
        return logits, weights, ids


class WeighsAgain(Experts):
    def choose(self, x):
        logits, _, ids = self.gate(x)
        return logits, logits.softmax(-1).gather(1, ids), ids


class WeighsByItsOwnLogits(Experts):
    def choose(self, x):
        logits, _, ids = self.gate(x)
        own = F.linear(x.reshape(-1, DIM), self.gate.weight.detach())
        return logits, own.softmax(-1).gather(1, ids), ids


class BiasInTheWeights(SlotRouter):
    def faulty(self, logits):
        scores = logits.sigmoid() + self.bias
        weights, ids = torch.topk(scores, 2, dim=-1)
        return logits, weights / weights.sum(-1, keepdim=True), ids


class BiasOnTheLogits(SlotRouter):
    def faulty(self, logits):
        _, weights, ids = self.correct(logits + self.bias)
        return logits, weights, ids


class NoBiasInEvaluation(SlotRouter):
    def faulty(self, logits):
        if self.training:
            return self.correct(logits)
        ids = torch.topk(logits.sigmoid(), 2, dim=-1).indices
        return logits, logits.sigmoid().gather(1, ids), ids


class BiasIn16Bits(SlotRouter):
    def faulty(self, logits):
        scores = logits.sigmoid()
        ids = torch.topk(scores + self.bias.to(self.weight.dtype).float(), 2, dim=-1).indices
        return logits, scores.gather(1, ids), ids


class TwoTopKs(SlotlessRouter):
    def faulty(self, logits):
        weights, ids = torch.topk(logits.softmax(-1), 2, dim=-1)
        return logits, weights, torch.topk(torch.zeros_like(logits).scatter(1, ids, 1.0), 2, dim=-1).indices


class TwoTopKsAlways(SlotlessRouter):
    def correct(self, logits):
        torch.topk(logits.softmax(-1), 1)
        return super().correct(logits)


class SortsInsteadOfTopK(SlotlessRouter):
    def faulty(self, logits):
        weights, ids = logits.softmax(-1).sort(-1, descending=True)
        return logits, weights[:, :2], ids[:, :2]


class SameExpertTwice(SlotRouter):
    def faulty(self, logits):
        logits, weights, ids = self.correct(logits)
        return logits, weights, ids[:, :1].expand(-1, 2).contiguous()


class LogitsWithoutGradient(SlotRouter):
    def faulty(self, logits):
        logits, weights, ids = self.correct(logits)
        return logits.detach(), weights, ids


class OtherLogits(SlotlessRouter):
    def faulty(self, logits):
        _, weights, ids = self.correct(logits)
        return logits * 2, weights, ids


class OtherWeights(SlotlessRouter):
    def faulty(self, logits):
        logits, weights, ids = self.correct(logits)
        return logits, weights.square(), ids


class AddsRandomNoise(SlotlessRouter):
    generator = torch.Generator()

    def faulty(self, logits):
        return self.correct(logits + torch.rand(logits.shape, generator=self.generator))


class RemembersTheLastCall(SlotlessRouter):
    def faulty(self, logits):
        before = getattr(self, "before", torch.zeros(())).detach()
        self.before = logits.mean().detach()
        return self.correct(logits + before * torch.arange(EXPERTS))


class NeverInTraining(SlotlessRouter):
    def train(self, mode=True):
        return super().train(False)


class AlwaysInTraining(SlotlessRouter):
    def train(self, mode=True):
        return super().train(True)


class SharedByCopies(SlotlessRouter):
    def __deepcopy__(self, memo):
        return self


class SavesEveryBuffer(SlotlessRouter):
    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, buffer in self._buffers.items():
            destination[prefix + name] = buffer


class AddsAnAttribute(SlotlessRouter):
    def faulty(self, logits):
        if "_equipoise" in vars(self):
            self.noticed = True
        return self.correct(logits)


class DropsPadding(Model):
    def forward(self, input_ids, attention_mask=None):
        if attention_mask is not None:
            input_ids = input_ids[attention_mask != 0][None]
        return super().forward(input_ids)


class DropsTheMask(Model):
    def forward(self, input_ids, attention_mask=None):
        if attention_mask is not None:
            return Model.__call__(self, input_ids)
        return super().forward(input_ids)


class ReturnsNothing(Model):
    def forward(self, input_ids):
        super().forward(input_ids)


BROKEN_MODELS = [
    (Model(block=ChoosesAgain), "bias moves the choice only", "the experts do not follow the choice"),
    (Model(block=WeighsAgain), "loss gradient", "a gradient that is off by"),
    (Model(block=WeighsByItsOwnLogits), "loss gradient", "a gradient that is off by"),
    (Model(BiasInTheWeights), "bias moves the choice only", "weights of the same choice of other bits"),
    (Model(BiasOnTheLogits), "bias moves the choice only", "the best by score and bias are"),
    (Model(NoBiasInEvaluation), "bias moves the choice only", "training False"),
    (Model(BiasIn16Bits), "cast keeps float32 biases", "the best by score and bias are"),
    (Model(TwoTopKs), "bias moves the choice only", "one torch.topk over its experts"),
    (Model(TwoTopKsAlways), "bias moves the choice only", "it calls torch.topk 2 times over the experts"),
    (Model(SortsInsteadOfTopK), "bias moves the choice only", "one torch.topk over its experts"),
    (Model(SortsInsteadOfTopK), "factor moves the choice only", "one torch.topk over its experts"),
    (Model(SortsInsteadOfTopK), "step reaches the router", "one torch.topk over its experts"),
    (Model(SameExpertTwice), "bias moves the choice only", "the same expert twice"),
    (Model(LogitsWithoutGradient), "loss gradient", "logits without a gradient"),
    (Model(OtherLogits), "bias moves the choice only", "the best by score and bias are"),
    (Model(OtherWeights), "bias moves the choice only", "weights that are not the scores of the chosen"),
    (Model(AddsRandomNoise), "unchanged at bias zero", "the model itself is not reproducible"),
    (Model(RemembersTheLastCall), "copies", "output of the copy of other bits"),
    (Model(RemembersTheLastCall), "detach restores", "attributes ['before']"),
    (Model(NeverInTraining), "counts each token once", "num_tokens 0"),
    (Model(AlwaysInTraining), "counts each token once", "counted by hand"),
    (Model(SharedByCopies), "attached once", "is attached already"),
    (Model(SavesEveryBuffer), "state dict", ADDED_SLOT),
    (Model(AddsAnAttribute), "detach restores", "attributes ['noticed']"),
    (DropsPadding(), "padding is not counted", "which token belongs to which sequence"),
    (ReturnsNothing(), "unchanged at bias zero", "got NoneType"),
]


def _name(value):
    if not isinstance(value, nn.Module):
        return value.replace(" ", "_")
    block = value.blocks[0]
    return "-".join(type(part).__name__ for part in (value, block, block.gate))


@pytest.mark.parametrize(("model", "invariant", "message_part"), BROKEN_MODELS, ids=_name)
def test_a_broken_model_fails_the_invariant_it_breaks(model, invariant, message_part):
    _fails(model, invariant, message_part)


def _fails(model, invariant, message_part):
    with pytest.raises(ConformanceError) as error:
        check_routers(model, only=invariant)
    message = str(error.value)
    assert message.startswith(f"{invariant}: ") and message.endswith(".")
    assert " must " in message.partition(" Got: ")[0]
    assert message_part in message.partition(" Got: ")[2], message
    assert f"model {type(model).__name__}, batch {{'input_ids': (2, 16)}}" in message


# ---- a broken library ----


def _counts_recomputation(patch):
    patch.setattr(torch._C, "_current_graph_task_id", lambda: -1)


def _counts_evaluation(patch):
    observe = Recorder.observe
    patch.setattr(Recorder, "observe", lambda self, call: observe(self, call._replace(is_training=True)))


def _counts_in(patch, mode):
    in_mode = Recorder._in_mode
    patch.setattr(Recorder, "_in_mode", lambda self, new: in_mode(self, Mode.COUNTING if new is mode else new))


def _counts_what_is_paused(patch):
    _counts_in(patch, Mode.PAUSED)


def _measures_into_the_window(patch):
    _counts_in(patch, Mode.MEASURING)


def _counts_padding(patch):
    fit = Tokens.fit
    patch.setattr(Tokens, "fit", lambda self, *args: (None, fit(self, *args)[1]))


def _twice_the_gradient(patch):
    gradient, add_score_gradient = Recorder.gradient, Recorder.add_score_gradient
    patch.setattr(Recorder, "gradient", lambda self, *args: 2 * gradient(self, *args))

    def add_twice(self, call, call_id, onto):
        return 2 * add_score_gradient(self, call, call_id, onto) - onto

    patch.setattr(Recorder, "add_score_gradient", add_twice)


def _ignores_the_factor(patch):
    serve = Losses._serve
    patch.setattr(Losses, "_serve", lambda self, *args: (serve(self, *args)[0], 1.0))


def _forgets_the_slot(patch):
    restore, restored = Biases.restore, set()

    def once(self, layer):
        if (id(self), layer) not in restored:
            restored.add((id(self), layer))
            restore(self, layer)

    patch.setattr(Biases, "restore", once)
    patch.setattr(Biases, "_write", lambda self, group, slots: [once(self, layer) for layer in group.layers])


def _casts_the_bias(patch):
    restore = Biases.restore

    def rounded(self, layer):
        biases = self.group_of[layer][0].biases
        biases.copy_(biases.bfloat16())
        restore(self, layer)

    patch.setattr(Biases, "restore", rounded)


def _copies_are_counted(patch):
    """A deep copy of a router takes the tap over."""

    def take_over(self, memo):
        self.router = memo.get(id(self.router), self.router)
        return self

    patch.setattr(Tap, "__deepcopy__", take_over, raising=False)


def _cannot_be_pickled(patch):
    def refuse(self, protocol):
        raise TypeError("cannot pickle a tap")

    patch.setattr(Tap, "__reduce_ex__", refuse)


def _saves_the_slot(patch):
    register = nn.Module.register_buffer
    patch.setattr(nn.Module, "register_buffer", lambda self, name, value, persistent=True: register(self, name, value))


def _leaves_hooks(patch):
    init = Taps.__init__

    def forget_hooks(self, *args):
        init(self, *args)
        self._hooks = []

    patch.setattr(Taps, "__init__", forget_hooks)


def _leaves_the_slot(patch):
    untap = equipoise.counting.taps.untap_router

    def untap_without_slot(router, slot_of_family):
        slot = router._buffers.get(ADDED_SLOT)
        untap(router, slot_of_family)
        router._buffers[ADDED_SLOT] = slot

    patch.setattr(equipoise.counting.taps, "untap_router", untap_without_slot)


def _attaches_twice(patch):
    patch.setattr(equipoise.attachment, "has_live_tap", lambda router: False)


class _BiasesWeights(BiasedTopK):
    num_choices = 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.topk:
            choice = args[0] * (1 + self.bias) if self.multiplies else args[0] + self.bias
            return torch.topk(choice, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Adds(BiasedTopK):
    def __init__(self, bias, multiplies=False, *others, **options):
        super().__init__(bias, False, *others, **options)


def _biased_weights(patch):
    patch.setattr(equipoise.routers.tapped, "BiasedTopK", _BiasesWeights)  # not in attach's own trial, which must pass


def _adds_instead_of_multiplying(patch):
    patch.setattr(equipoise.routers.tapped, "BiasedTopK", _Adds)


def _moves_when_skipped(patch):
    step = Balance.step
    patch.setattr(Balance, "step", lambda self, applied=True: step(self))


BROKEN_LIBRARY = [
    (_counts_recomputation, "recomputation is not counted", ""),
    (_counts_evaluation, "counts each token once", "counted by hand"),
    (_counts_what_is_paused, "counts each token once", "counted by hand"),
    (_measures_into_the_window, "measuring counts evaluation", "a load of [0, 0, 0, 0, 0, 0]"),
    (_counts_padding, "padding is not counted", "num_tokens 32, not 23"),
    (_twice_the_gradient, "loss gradient", "a gradient that is off by 1 of its norm"),
    (_ignores_the_factor, "loss gradient", "a gradient that is off by"),
    (_forgets_the_slot, "step reaches the router", "a bias of"),
    (_casts_the_bias, "cast keeps float32 biases", "Balance.biases of other bits"),
    (_copies_are_counted, "copies", ""),
    (_cannot_be_pickled, "pickle", "cannot pickle a tap"),
    (_saves_the_slot, "state dict", ADDED_SLOT),
    (_leaves_hooks, "detach restores", "hooks that were left"),
    (_leaves_the_slot, "detach restores", "buffers"),
    (_attaches_twice, "attached once", ""),
    (_biased_weights, "bias moves the choice only", "weights of the same choice of other bits"),
    (_biased_weights, "factor moves the choice only", "weights of the same choice of other bits"),
    (_adds_instead_of_multiplying, "factor moves the choice only", "the best by score and bias are"),
    (_moves_when_skipped, "step reaches the router", "applied False"),
]


@pytest.mark.parametrize(("breaks", "invariant", "message_part"), BROKEN_LIBRARY)
def test_a_broken_library_fails_the_invariant_it_breaks(monkeypatch, breaks, invariant, message_part):
    breaks(monkeypatch)
    _fails(Model(), invariant, message_part)


def test_every_invariant_can_fail():
    assert {invariant for _, invariant, _ in BROKEN_MODELS + BROKEN_LIBRARY} == ALL


# ---- arguments and errors ----


@pytest.mark.parametrize("invariant", ROUTER_INVARIANTS)
def test_only_checks_one_invariant(invariant):
    assert check_routers(Model(), only=invariant) == (invariant,)


def test_the_first_failure_is_raised():
    with pytest.raises(ConformanceError, match="^bias moves the choice only: "):
        check_routers(Model(BiasOnTheLogits))


def test_a_model_that_cannot_be_attached_fails_with_the_reason():
    with pytest.raises(ConformanceError, match="Linear holds none, and nothing") as error:
        check_routers(nn.Linear(2, 2), {"input": torch.zeros(2, 2)})
    assert isinstance(error.value.__cause__, EquipoiseError)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="only must be one of unchanged at bias zero, .*: got 'speed'"):
        check_routers(Model(), only="speed")
    with pytest.raises(TypeError, match="model must be a torch.nn.Module: got str"):
        check_routers("mixtral")
    with pytest.raises(ValueError, match=r"batch must be given for a model without config\.vocab_size"):
        check_routers(models.tiny_lm())


def test_checkpointing_of_the_model_and_of_the_call_are_both_tried(monkeypatch):
    runs = []
    for name in ("_checkpointed_layers", "_checkpointed_call"):
        run_checkpointed = getattr(equipoise.testing.routers.counts, name)

        def spy(model, batch, reentrant, name=name, run_checkpointed=run_checkpointed):
            loss = run_checkpointed(model, batch, reentrant)
            runs.append((name, reentrant, any("_equipoise" in vars(m) for m in model.modules())))
            return loss

        spy.__name__ = name
        monkeypatch.setattr(equipoise.testing.routers.counts, name, spy)
    check_routers(models.family("qwen3_moe"), only="recomputation is not counted")
    assert {(name, reentrant) for name, reentrant, is_attached in runs if is_attached} == {
        (name, reentrant) for name in ("_checkpointed_layers", "_checkpointed_call") for reentrant in (True, False)
    }


def test_the_flipped_batch_differs():
    subject = Subject(Model(), {"input_ids": IDS, "flag": True}, None)
    assert not torch.equal(subject.flipped_batch["input_ids"], IDS) and subject.flipped_batch["flag"] is True


def test_a_model_that_is_attached_is_refused():
    model = models.tiny_lm()
    balance = equipoise.attachment.attach(model, "loss-free")
    for attached in (model, deepcopy(model)):
        with pytest.raises(ValueError, match="model must be as it is before attach"):
            check_routers(attached, {"input_ids": IDS})
    balance.detach()
    assert check_routers(model, {"input_ids": IDS}, only="detach restores") == ("detach restores",)
