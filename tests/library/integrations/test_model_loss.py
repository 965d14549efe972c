"""A load-balancing loss of the model's own is noticed wherever it comes from, and what the message advises ends it."""

import copy
import logging
import pickle
from types import SimpleNamespace

import pytest
import shrunken
import torch
from models import family
from torch import nn
from trainer_ranks import rows, train
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Trainer,
)

import equipoise
from equipoise.errors import UsageError
from equipoise.integrations import EquipoiseCallback

FLAT = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "deepseek_v4")  # the model copies the coefficient
NESTED = ("qwen3_vl_moe", "glm4v_moe", "minimax_m3_vl", "ernie4_5_vl_moe")  # text_config holds it; the last copies it
STRATEGY = "loss-free"


def whole(name):
    """A tiny model of a family, vision included."""
    config = AutoConfig.for_model(name)
    for part in (config, config.get_text_config()):
        shrunken.shrink(part)
        for key, value in shrunken.EXTRA_OPTIONS.get(name, {}).items():
            if hasattr(part, key):
                setattr(part, key, value)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(0)
    auto = AutoModelForCausalLM if name in FLAT else AutoModelForImageTextToText
    return auto.from_config(config).train()


def batch():
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradients(model, **arguments):
    model.zero_grad()
    model(**batch(), **arguments).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def differ(ours, theirs):
    assert ours.keys() == theirs.keys()
    return any(not torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def said(caplog):
    """The warnings since the last call."""
    caplog.set_level(logging.WARNING, "equipoise")

    def take():
        messages = [record.message for record in caplog.records if "of its own" in record.message]
        caplog.clear()
        return messages

    return take


@pytest.mark.parametrize("name", FLAT + NESTED)
def test_each_family_is_warned_of_and_the_advice_works(name, said):
    model = whole(name)
    text = model.config.get_text_config()
    assert (text is model.config) == (name in FLAT)
    task = gradients(model)
    text.router_aux_loss_coef = coefficient = 0.25
    if hasattr(model, "router_aux_loss_coef"):
        model.router_aux_loss_coef = coefficient
    # an argument of the call
    balance = equipoise.attach(model, STRATEGY)
    assert not differ(gradients(model), task) and said() == []
    assert differ(gradients(model, output_router_logits=True), task)
    (message,) = said()
    assert "one that its forward returns has a gradient" in message
    gradients(model, output_router_logits=True)
    assert said() == []  # once
    balance.detach()
    # the config
    text.output_router_logits = True
    balance = equipoise.attach(model, STRATEGY)
    (message,) = said()
    assert "output_router_logits with router_aux_loss_coef=0.25" in message
    assert differ(gradients(model), task) and said() == []
    balance.detach()
    # the advice
    assert "set model.config.get_text_config().output_router_logits = False and call the model without" in message
    model.config.get_text_config().output_router_logits = False
    balance = equipoise.attach(model, STRATEGY)
    assert not differ(gradients(model), task) and said() == []
    balance.detach()
    # the coefficient, as TRL sets it
    text.router_aux_loss_coef = 0.0
    if hasattr(model, "router_aux_loss_coef"):
        model.router_aux_loss_coef = 0.0
    equipoise.attach(model, STRATEGY)
    assert not differ(gradients(model, output_router_logits=True), task) and said() == []


def test_a_coefficient_that_the_config_only_had_when_the_model_was_made_counts(said):
    """Mixtral copies it. Zeroing the config is too late, and the gradient says so."""
    model = family("mixtral")
    model.config.router_aux_loss_coef = 0.0
    equipoise.attach(model, STRATEGY)
    model(**batch(), output_router_logits=True).loss.backward()
    assert len(said()) == 1


@pytest.mark.parametrize("coefficient", [0.1, 0.0])
def test_a_loss_that_the_caller_weighs_is_known_by_its_gradient(coefficient, said):
    """As TRL's DPO: no labels, and the loss of the output is weighed outside the model."""
    model = family("qwen3_moe", router_aux_loss_coef=0.0)
    equipoise.attach(model, STRATEGY)
    output = model(batch()["input_ids"], output_router_logits=True)
    (output.logits.float().square().mean() + coefficient * output.aux_loss).backward()
    assert len(said()) == (coefficient != 0)


def test_forwards_without_a_gradient_say_nothing_and_the_hook_ends_with_the_first_that_has_one(said):
    model = family("qwen3_moe")
    num_hooks = len(model._forward_hooks)
    balance = equipoise.attach(model, STRATEGY)
    num_attached = len(model._forward_hooks)
    with torch.no_grad():
        model(**batch(), output_router_logits=True)
    model.eval()(**batch(), output_router_logits=True)  # a gradient may be taken in eval mode too, and is not
    assert said() == [] and len(model._forward_hooks) == num_attached - 1
    model.train()(**batch(), output_router_logits=True).loss.backward()
    balance.detach()
    assert len(model._forward_hooks) == num_hooks
    balance = equipoise.attach(model, STRATEGY)
    balance.detach()
    assert len(model._forward_hooks) == num_hooks
    model(**batch(), output_router_logits=True).loss.backward()
    assert said() == []


def test_what_only_counts_says_nothing(said):
    model = family("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.1)
    equipoise.attach(model)
    model(**batch()).loss.backward()
    assert said() == []


def test_copies_say_nothing(said):
    model = family("qwen3_moe", router_aux_loss_coef=0.1)
    equipoise.attach(model, STRATEGY)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other(**batch(), output_router_logits=True).loss.backward()
    assert said() == []
    model(**batch(), output_router_logits=True).loss.backward()
    assert len(said()) == 1


def test_a_head_without_such_a_loss_is_not_accused(said):
    """The config switches it on, and a classifier of Transformers has none."""
    config = family("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.1).config
    model = AutoModelForSequenceClassification.from_config(config).train()
    equipoise.attach(model, STRATEGY)
    model(batch()["input_ids"], labels=torch.tensor([0, 1])).loss.backward()
    assert said() == []


class Wrapper(nn.Module):
    """As a LightningModule: attached as a whole, with the model inside; returns a loss."""

    def __init__(self, model, **arguments):
        super().__init__()
        self.model, self.arguments = model, arguments

    def forward(self, **inputs):
        return self.model(**inputs, **self.arguments).loss


@pytest.mark.parametrize("by", ["argument", "config"])
def test_a_model_inside_a_wrapper_is_looked_at(by, said):
    options = dict(output_router_logits=True, router_aux_loss_coef=0.1) if by == "config" else {}
    wrapper = Wrapper(family("qwen3_moe", **options), **({"output_router_logits": True} if by == "argument" else {}))
    equipoise.attach(wrapper, STRATEGY)
    assert len(said()) == (by == "config")
    wrapper(**batch()).backward()
    assert len(said()) == (by == "argument")


class Own(nn.Module):
    """A model of one's own that returns its loss as it likes."""

    def __init__(self, kind, coefficient):
        super().__init__()
        self.model, self.kind, self.coefficient = family("qwen3_moe"), kind, coefficient

    def forward(self, input_ids, labels):
        logits = self.model(input_ids).logits
        own = logits.float().logsumexp(-1).square().mean()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) + self.coefficient * own
        return self.kind(loss=loss, aux_loss=own)


@pytest.mark.parametrize("kind", [dict, SimpleNamespace])
@pytest.mark.parametrize("coefficient", [0.1, 0.0])
def test_a_model_of_ones_own_is_known_by_the_gradient_too(kind, coefficient, said):
    model = Own(kind, coefficient)
    equipoise.attach(model, STRATEGY)
    output = model(**batch())
    (output["loss"] if kind is dict else output.loss).backward()
    assert len(said()) == (coefficient != 0)


@pytest.mark.parametrize("coefficient", [0.1, 0.0])
def test_a_tuple_is_judged_by_the_argument_and_the_coefficient(coefficient, said):
    model = family("qwen3_moe", router_aux_loss_coef=coefficient)
    equipoise.attach(model, STRATEGY)
    for _ in range(2):
        model(**batch(), return_dict=False, output_router_logits=True)[0].backward()
    assert len(said()) == (coefficient != 0)


@pytest.mark.slow
@pytest.mark.parametrize("coefficient", [0.1, 0.0])
def test_a_compiled_model_stays_one_graph_and_is_judged_by_its_coefficient(coefficient, said):
    model = family("qwen3_moe", layers=1, router_aux_loss_coef=coefficient)
    with torch.no_grad():
        model(**batch(), output_router_logits=True)  # Transformers installs hooks, which no graph can hold
    equipoise.attach(model, STRATEGY)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(**batch(), output_router_logits=True).loss.backward()
    messages = said()
    assert len(messages) == (coefficient != 0)
    assert all("with router_aux_loss_coef=0.1" in message for message in messages)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()


# ---- under the Trainer ----

LOSS = "lbl:coefficient=1e-1"
REFUSED = r"(?s)only one load-balancing loss must act.*{}.*get_text_config\(\).*with_model_loss=True"


class AskingTrainer(Trainer):
    """As TRL: asks for the router logits itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, {**inputs, "output_router_logits": True}, return_outputs, num_items_in_batch)


def test_the_trainer_refuses_a_loss_that_is_asked_for_in_the_call(said):
    def model():
        return family("qwen3_moe", router_aux_loss_coef=0.1)

    with pytest.raises(UsageError, match=REFUSED.format("forward returns has a gradient")):
        train(model(), rows(8), [EquipoiseCallback(LOSS)], kind=AskingTrainer)
    assert said() == []  # the error says it
    callback = EquipoiseCallback(LOSS, with_model_loss=True)
    train(model(), rows(8), [callback], kind=AskingTrainer)
    assert callback.balance.num_windows == 1
    callback = EquipoiseCallback(LOSS)
    train(family("qwen3_moe", router_aux_loss_coef=0.0), rows(8), [callback], kind=AskingTrainer)
    assert callback.balance.num_windows == 1
    callback.detach()
    assert not callback._hooks


def test_the_trainer_refuses_a_loss_that_the_text_config_switches_on():
    model = whole("qwen3_vl_moe")
    model.config.text_config.output_router_logits = True
    with pytest.raises(UsageError, match=REFUSED.format("router_aux_loss_coef=0.001")):
        train(model, rows(8), [EquipoiseCallback(LOSS)])
    assert not model._forward_hooks
    model.config.get_text_config().output_router_logits = False  # as it advises
    callback = EquipoiseCallback(LOSS)
    train(model, rows(8), [callback])
    assert callback.balance.num_windows == 1
