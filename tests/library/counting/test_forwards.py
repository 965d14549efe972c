"""Which forwards count, and where a micro-batch begins: the outermost forward of the model knows both."""

import copy
import logging
import threading
from contextlib import nullcontext

import pytest
import torch
from models import DIM, VOCAB, Block, K, tiny_lm
from torch import nn
from torch.utils.checkpoint import checkpoint
from windows import (
    LAYERS,
    PADDING_MASK,
    assert_gradients_close,
    assert_tokens_counted,
    attach_tiny,
    clone_gradients,
    load_sums,
    random_ids,
)

from equipoise import EquipoiseError, attach

# ---- forwards without gradients ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("strategy", ["loss-free", "lbl:scope=micro_batch", "quantile+lbl:scope=sequence"])
def test_a_forward_without_gradients_in_training_mode_does_not_count(mode, strategy, caplog):
    """The log-probabilities of a reference model (DPO, GRPO), a rollout, the first pass of GradCache."""
    plain, plain_balance = attach_tiny(strategy)
    model, balance = attach_tiny(strategy)
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            (plain(random_ids()) + plain_balance.loss()).backward()
            with mode():
                model(random_ids(rows=5, seed=1))
            loss = model(random_ids())
            with mode():
                for seed in range(4):
                    model(random_ids(length=1, seed=seed))
            (loss + balance.loss()).backward()
            assert balance.num_tokens == 14
            plain_balance.step()
            balance.step()
    assert_tokens_counted(balance, 14)
    assert all(torch.equal(balance.biases[name], plain_balance.biases[name]) for name in LAYERS)
    assert_gradients_close(clone_gradients(model), clone_gradients(plain), rtol=0)
    (record,) = caplog.records
    assert "began with gradients off, and was not counted" in record.message
    assert "balance.counting()" in record.message


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("part", ["blocks", "model"])
def test_reentrant_checkpointing_switches_gradients_off_only_inside(reentrant, part):
    model, balance = attach_tiny("lbl", checkpointing=("reentrant" if reentrant else "non_reentrant"))
    expected, expected_balance = attach_tiny("lbl")
    forward = model
    if part == "model":
        model.checkpointing = None
        anchor = torch.zeros((), requires_grad=True)  # reentrant checkpointing needs an input with a gradient

        def forward(ids):
            return checkpoint(lambda anchor, ids: model(ids) + anchor, anchor, ids, use_reentrant=reentrant)

    (forward(random_ids()) + balance.loss()).backward()
    (expected(random_ids()) + expected_balance.loss()).backward()
    balance.step()
    assert_tokens_counted(balance, 14)
    assert_gradients_close(clone_gradients(model), clone_gradients(expected))
    if part == "blocks":
        with torch.no_grad():
            forward(random_ids())
        with pytest.raises(EquipoiseError, match="none was. They were called without gradients"):
            balance.step()


class Step(nn.Module):
    """A training step as a module: a pass without gradients, then one with."""

    def __init__(self):
        super().__init__()
        self.model = tiny_lm()

    def forward(self, ids):
        with torch.no_grad():
            reference = self.model(ids)
        return self.model(ids) - 0 * reference


def test_a_pass_without_gradients_inside_the_forward_of_a_wrapper_does_not_count():
    plain, step = tiny_lm(), Step().train()
    plain_balance, balance = attach(plain, "lbl"), attach(step, "lbl")
    (plain(random_ids()) + plain_balance.loss()).backward()
    (step(random_ids()) + balance.loss()).backward()
    assert balance.num_tokens == 14
    balance.step()
    assert set(load_sums(balance).values()) == {K * 14}
    assert_gradients_close(clone_gradients(step.model), clone_gradients(plain), rtol=0)


def test_blocks_called_outside_a_forward_count_by_the_gradient_mode_around_them():
    model, balance = attach_tiny("loss-free")
    x = torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for block in model.blocks:
        checkpoint(block, x, use_reentrant=True)
    with torch.no_grad():
        for block in model.blocks:
            block(x)
    balance.step()
    assert_tokens_counted(balance, 14)


def test_counting_counts_in_training_mode_only():
    model, balance = attach_tiny("loss-free")
    with torch.no_grad(), balance.counting():
        model(random_ids())
        model.eval()
        model(random_ids(rows=3))
        model.train()
    with torch.no_grad():
        model(random_ids(rows=4))
    balance.step()
    assert_tokens_counted(balance, 14)


def test_a_compiled_forward_without_gradients_does_not_count():
    torch._dynamo.reset()
    model, balance = attach_tiny("loss-free+lbl")
    forward = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            forward(random_ids())
        (forward(random_ids()) + balance.loss()).backward()
        balance.step()
        assert_tokens_counted(balance, 14)


@pytest.mark.parametrize("strategy", ["loss-free+lbl", "lbl"])
def test_training_a_model_in_evaluation_mode_is_said(strategy, caplog):
    model, balance = attach_tiny(strategy)
    model.eval()
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(3):
            assert (model(random_ids()) + balance.loss()).backward() is None
    (record,) = caplog.records
    assert "evaluation mode, with gradients on. Call model.train()" in record.message
    with pytest.raises(EquipoiseError, match="They were called in evaluation mode"):
        balance.step()


def test_an_evaluation_between_micro_batches_is_not_remarked_upon(caplog):
    model, balance = attach_tiny("lbl")
    with caplog.at_level(logging.WARNING, "equipoise"):
        loss = model(random_ids())
        model.eval()
        with torch.no_grad():
            model(random_ids())
        model.train()
        (loss + balance.loss()).backward()
        balance.loss()
        balance.step()
    assert not caplog.records


def test_a_loss_that_covers_several_forwards_says_so_once(caplog):
    """A cell that failed between the forward and ``loss()`` and is run again counts twice: nothing shows it."""
    model, balance = attach_tiny("lbl")
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            model(random_ids())  # its loss is never made
            (model(random_ids()) + balance.loss()).backward()
            balance.step()
    (record,) = [record for record in caplog.records if "covers" in record.message]
    assert "loss() covers 2 forwards" in record.message and "step(applied=False) drops" in record.message
    assert_tokens_counted(balance, 28)
    model(random_ids())
    balance.step(applied=False)
    (model(random_ids()) + balance.loss()).backward()
    balance.step()
    assert_tokens_counted(balance, 14)


class Detaching(nn.Module):
    """Wraps a router, and gives out logits that its weights do not get a gradient from."""

    def __init__(self):
        super().__init__()
        self.block = Block("softmax")
        gate = self.block.gate
        plain = type(gate).forward

        class DetachingRouter(type(gate)):
            def forward(self, hidden_states):
                logits, weights, expert_ids = plain(self, hidden_states)
                return logits.detach(), weights, expert_ids

        gate.__class__ = DetachingRouter

    def forward(self, x):
        return self.block(x).square().mean()


def test_logits_without_a_gradient_are_said(caplog):
    model = Detaching().train()
    balance = attach(model, "lbl:coefficient=1")
    x = torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(2):
            (model(x) + balance.loss()).backward()
            balance.step()
        model.block.gate.weight.requires_grad_(False)
    (record,) = [record for record in caplog.records if "detached" in record.message]
    assert "the balancing loss gives block.gate no gradient" in record.message
    caplog.clear()
    model, balance = attach_tiny("lbl")
    model.embed.weight.requires_grad_(False)
    model.blocks[0].gate.weight.requires_grad_(False)
    with caplog.at_level(logging.WARNING, "equipoise"):
        (model(random_ids()) + balance.loss()).backward()
        balance.step()
    assert not [record for record in caplog.records if "detached" in record.message]


# ---- where a micro-batch begins ----


class Looped(nn.Module):
    """Calls one block several times in a forward."""

    def __init__(self, loops=4):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.block, self.loops = nn.Embedding(VOCAB, DIM), Block("softmax"), loops

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for _ in range(self.loops):
            x = self.block(x)
        return x.square().mean()


@pytest.mark.parametrize("scope", ["global_batch", "micro_batch", "sequence"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_looped_block_has_one_micro_batch_per_forward(scope, compiled):
    """With ``loss_scale`` as with tickets. The gradient was as many times too strong as there are loops."""
    torch._dynamo.reset()
    strategy = f"loss-free+lbl:scope={scope},coefficient=0.5"
    expected, expected_balance = Looped().train(), None
    expected_balance = attach(expected, strategy)
    model = Looped().train()
    balance = attach(model, strategy)
    balance.loss_scale = 0.5
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for seed in range(2):
        ((expected(random_ids(seed=seed)) + expected_balance.loss()) * 0.5).backward()
        assert expected_balance.num_tokens == 14, "a token counts once, however often its block is called"
        (forward(random_ids(seed=seed)) * 0.5).backward()
        assert balance.num_tokens == 14
    assert_gradients_close(clone_gradients(model), clone_gradients(expected))
    balance.step()
    assert load_sums(balance) == {"block.gate": K * 14 * 4 * 2}
    expected_balance.step()
    for name in ("maxvio_micro", "maxvio_batch", "load_balancing_loss"):
        assert balance.metrics()[name] == pytest.approx(expected_balance.metrics()[name], abs=1e-6)


def test_num_tokens_weighs_uneven_micro_batches_exactly():
    """``(ce_sum + num_tokens * loss()) / total``, the formula for token-exact accumulation, with a looped block."""
    strategy = "lbl:scope=micro_batch,coefficient=0.5"
    model = Looped()
    balance = attach(model, strategy)
    values, tokens = [], []
    for rows in (1, 3):
        model(random_ids(rows=rows))
        tokens.append(int(balance.num_tokens))
        values.append(float(balance.loss().detach()))
    balance.step()
    assert tokens == [7, 21]
    assert all(0.4 < value < 1.5 for value in values), "a mean over tokens does not grow with the loops"


def test_a_mask_that_is_changed_in_place_after_the_forward_does_not_change_its_tokens():
    """Of a layer with several calls: the tokens of those that came again are only asked for when somebody reads."""
    model, mask = Looped(), PADDING_MASK.bool()
    balance = attach(model, "loss-free")
    balance.token_mask(mask)
    model(random_ids())
    num_tokens = int(mask.sum())
    mask.fill_(True)
    assert balance.num_tokens == num_tokens < 14


def test_a_hundred_forwards_of_four_loops_do_not_look_like_a_forgotten_step(caplog):
    model = Looped()
    balance = attach(model, "loss-free")
    with caplog.at_level(logging.WARNING, "equipoise"):
        for _ in range(100):
            model(random_ids(rows=1, length=1))
    assert not caplog.records
    balance.step()


class TrainingStep(nn.Module):
    """A wrapper whose forward nobody calls."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleDict({"looped": Looped()})

    def forward(self, batch):
        raise AssertionError

    def training_step(self, batch):
        return self.net["looped"](batch)


def test_the_forward_of_a_wrapped_network_is_a_micro_batch():
    model = TrainingStep().train()
    balance = attach(model, "loss-free+lbl:scope=micro_batch")
    balance.loss_scale = 1.0
    for seed in range(2):
        model.training_step(random_ids(seed=seed)).backward()
        assert balance.num_tokens == 14
        with torch.no_grad():
            model.training_step(random_ids(rows=3))
    balance.step()
    assert load_sums(balance) == {"net.looped.block.gate": K * 14 * 4 * 2}
    assert len(balance.metrics()) > 0


class Stage(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.block = Block("softmax")

    def forward(self, x):
        return self.block(x)


def test_stages_that_run_interleaved_keep_their_micro_batches():
    """Interleaved1F1B: a rank has two stages, and runs the second of one micro-batch after the first of the next."""
    inputs = [torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    strategy = "lbl:scope=micro_batch,coefficient=0.5"
    expected = nn.ModuleList(Stage(seed) for seed in range(2)).train()
    expected_balance = attach(expected, strategy)
    for x in inputs:
        loss = expected[1](expected[0](x)).square().mean() + expected_balance.loss()
        loss.backward()
    stages = nn.ModuleList(Stage(seed) for seed in range(2)).train()
    balance = attach(stages, strategy)
    balance.loss_scale = 1.0
    sent = {0: stages[0](inputs[0]), 1: stages[0](inputs[1])}
    for number in range(3):
        stages[1](sent.pop(number)).square().mean().backward()
        if number == 0:
            sent[2] = stages[0](inputs[2])
    assert_gradients_close(clone_gradients(stages), clone_gradients(expected))
    balance.step()
    assert list(load_sums(balance).values()) == [K * 14 * 3] * 2


# ---- forwards inside a forward ----


class Recursive(nn.Module):
    """Calls itself: with gradients, as in recursive reasoning, or without, as in a generation inside a forward."""

    def __init__(self, gradients, fails=False):
        super().__init__()
        self.net, self.gradients, self.fails = tiny_lm(), gradients, fails

    def forward(self, input_ids, attention_mask=None, depth=0):
        loss = self.net(input_ids, attention_mask)
        if depth == 0:
            with nullcontext() if self.gradients else torch.no_grad():
                inner = self(input_ids[:1], None, depth=1)
            loss = loss + (inner if self.gradients else 0.0)
            if self.fails:
                raise RuntimeError("no memory")
            loss = loss + self.net(input_ids, attention_mask)
        return loss


@pytest.mark.parametrize("gradients", [True, False])
def test_a_forward_that_calls_the_model_again_loses_nothing(gradients):
    model = Recursive(gradients).train()
    balance = attach(model, "loss-free+lbl")
    for _ in range(2):
        (model(random_ids(), PADDING_MASK) + balance.loss()).backward()
        inner = 7 if gradients else 0
        assert balance.num_tokens == 10 + inner, "the outer forward routes its tokens twice, the inner one others"
        balance.step()
        assert set(load_sums(balance).values()) == {K * (10 + inner + 10)}


def test_generation_inside_a_forward_of_a_compiled_wrapper_is_left_to_the_outermost_forward():
    model = Recursive(gradients=False).train()
    balance = attach(model, "loss-free")
    model(random_ids()).backward()
    balance.step()
    assert set(load_sums(balance).values()) == {K * 28}


def test_a_failed_forward_is_dropped_and_an_earlier_error_is_not_a_failure():
    model = Recursive(gradients=True, fails=True).train()
    balance = attach(model, "loss-free+lbl")
    with pytest.raises(RuntimeError, match="no memory"):
        model(random_ids())
    model.fails = False
    try:
        raise ValueError("of the caller")
    except ValueError:  # a forward that returns nothing, in an except block
        handle = model.register_forward_hook(lambda *_: None)
        (model(random_ids()) + balance.loss()).backward()
        handle.remove()
    balance.step()
    assert set(load_sums(balance).values()) == {K * (14 + 7 + 14)}


class Silent(nn.Module):
    """Returns nothing, and keeps its loss."""

    def __init__(self):
        super().__init__()
        self.net = tiny_lm()

    def forward(self, input_ids):
        self.loss = self.net(input_ids)


def test_a_forward_without_output_inside_an_except_block_counts():
    model = Silent().train()
    balance = attach(model, "loss-free+lbl")
    try:
        raise ValueError
    except ValueError:
        model(random_ids())
    (model.loss + balance.loss()).backward()
    balance.step()
    assert set(load_sums(balance).values()) == {K * 14}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_forward_is_dropped_at_the_next_one(error):
    model, balance = attach_tiny("loss-free+lbl")

    def interrupt(*_):
        raise error

    handle = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        model(random_ids(rows=5), torch.ones(5, 7))
    handle.remove()
    (model(random_ids()) + balance.loss()).backward()
    assert balance.num_tokens == 14
    balance.step()
    assert_tokens_counted(balance, 14)


def test_a_second_thread_may_not_begin_a_forward_of_the_same_model():
    model, balance = attach_tiny("loss-free")
    inside, finish, errors = threading.Event(), threading.Event(), []

    def hold(*_):
        inside.set()
        assert finish.wait(60)

    handle = model.blocks[0].register_forward_pre_hook(hold)
    thread = threading.Thread(target=lambda: model(random_ids()))
    thread.start()
    assert inside.wait(60)
    handle.remove()
    try:
        with pytest.raises(EquipoiseError, match="before another thread begins one of the same model"):
            model(random_ids(rows=3), torch.ones(3, 7))
    except BaseException as caught:
        errors.append(caught)
    finish.set()
    thread.join()
    assert not errors
    model(random_ids())
    balance.step()
    assert_tokens_counted(balance, 28)


def test_a_thread_that_is_gone_blocks_nothing():
    model, balance = attach_tiny("loss-free")

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.blocks[1].register_forward_pre_hook(interrupt)

    def run():
        with pytest.raises(KeyboardInterrupt):
            model(random_ids())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    handle.remove()
    model(random_ids(rows=3))
    balance.step()
    assert_tokens_counted(balance, 21)


# ---- masks and micro-batches ----


@pytest.mark.parametrize("has_loss", [True, False])
def test_a_mask_is_for_one_forward_where_forwards_are_micro_batches(has_loss):
    model, balance = attach_tiny("loss-free" + "+lbl" * has_loss)
    balance.loss_scale = 1.0 if has_loss else None
    balance.token_mask(PADDING_MASK)
    model(random_ids()).backward()
    with pytest.raises(EquipoiseError, match="token_mask.. must be called before every forward"):
        model(random_ids())
    with balance.paused():
        model(random_ids())
    model.eval()
    model(random_ids())
    model.train()
    balance.token_mask(None)
    model(random_ids()).backward()
    balance.step()
    assert_tokens_counted(balance, 10 + 14)


def test_with_tickets_a_mask_is_for_all_forwards_of_its_micro_batch():
    model, balance = attach_tiny("lbl")
    balance.token_mask(PADDING_MASK)
    loss = model(random_ids()) + model(random_ids(seed=1))
    (loss + balance.loss()).backward()
    balance.step()
    assert_tokens_counted(balance, 20)


def test_a_copy_of_an_attached_model_has_no_context():
    model, balance = attach_tiny("lbl")
    other = copy.deepcopy(model)
    loss = model(random_ids())
    with torch.no_grad():
        other(random_ids(rows=5), torch.ones(5, 7))
    (loss + balance.loss()).backward()
    balance.step()
    assert_tokens_counted(balance, 14)
