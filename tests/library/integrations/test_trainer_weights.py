"""Under the Trainer the balancing loss weighs as the model's loss does, whatever that loss does with the number of
items in the batch that the Trainer passes.

Each expected gradient is that of a loss written out here: from the logits, with the factors of the Trainer by hand.
"""

import copy

import pytest
import torch
from models import family
from ranks import distance
from torch import nn
from trainer_ranks import Watch, batches, rows, train
from transformers import (
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Qwen3MoeForCausalLM,
    Trainer,
)
from transformers.loss.loss_utils import fixed_cross_entropy

import equipoise
from equipoise.errors import UsageError
from equipoise.integrations import EquipoiseCallback

LOSS = "lbl:coefficient=1e-1"
ACCUMULATED = 2
cross_entropy = nn.functional.cross_entropy


def classifier(auto, **options):
    return auto.from_config(family("qwen3_moe", classifier_dropout=0.0, **options).config).train()


def data(**columns):
    """Eight rows: two steps of two micro-batches. ``columns`` gives by name the value of a row with this number."""
    plain = [{key: row[key] for key in ("input_ids", "attention_mask")} for row in rows(8)]
    return [row | {name: value(number, row) for name, value in columns.items()} for number, row in enumerate(plain)]


def label_rows():
    return rows(8)


# ---- models ----


class Inner(nn.Module):
    """A model that computes its loss itself, from the logits of one of Transformers."""

    def __init__(self):
        super().__init__()
        self.model = family("qwen3_moe")

    def logits(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask=attention_mask).logits


class Ignoring(Inner):
    def forward(self, input_ids, attention_mask, labels, **kwargs):
        logits = self.logits(input_ids, attention_mask)
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


class IgnoringTuple(Ignoring):
    def forward(self, *args, **kwargs):
        return tuple(super().forward(*args, **kwargs).values())


class Guarding(Ignoring):
    """Looks at the number, its device and type, and does not use it."""

    def forward(self, *args, num_items_in_batch=None, **kwargs):
        if num_items_in_batch is not None:
            assert num_items_in_batch > 0
            num_items_in_batch = num_items_in_batch.to(num_items_in_batch.device, torch.float32)
        return super().forward(*args, **kwargs)


class Summing(Inner):
    def forward(self, input_ids, attention_mask, labels, num_items_in_batch=None, **kwargs):
        logits = self.logits(input_ids, attention_mask)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return {"loss": loss / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)}


class Reading(Summing):
    read = staticmethod(float)

    def forward(self, *args, num_items_in_batch=None, **kwargs):
        if num_items_in_batch is not None:
            num_items_in_batch = self.read(num_items_in_batch)
        return super().forward(*args, num_items_in_batch=num_items_in_batch, **kwargs)


class MaskedLM(Qwen3MoeForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.loss_type = "ForMaskedLM"


def with_loss_function(function, **options):
    model = family("qwen3_moe", **options)
    model.loss_function = function
    return model


def ignoring_function(logits, labels, vocab_size, **kwargs):
    return cross_entropy(logits.view(-1, vocab_size), labels.view(-1))


def summing_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """As a causal loss, but written anew."""
    logits, labels = logits[:, :-1].reshape(-1, vocab_size), labels[:, 1:].reshape(-1)
    return cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def unshifted_function(logits, labels, vocab_size, num_items_in_batch=None, **kwargs):
    """As the decoder of an encoder-decoder, whose inputs are shifted instead of its labels."""
    return fixed_cross_entropy(logits.view(-1, vocab_size), labels.view(-1), num_items_in_batch)


# ---- the losses, written out: a mean over the items of one micro-batch ----


def shifted(output, batch):
    return cross_entropy(output.logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten())


def unshifted(output, batch):
    return cross_entropy(output.logits.float().flatten(0, 1), batch["labels"].flatten())


def by_row(output, batch):
    return cross_entropy(output.logits, batch["labels"])


def squared_error(output, batch):
    return (output.logits.squeeze() - batch["labels"]).square().mean()


def by_span(output, batch):
    start = cross_entropy(output.start_logits, batch["start_positions"])
    return (start + cross_entropy(output.end_logits, batch["end_positions"])) / 2


# ---- the factor of a micro-batch under the Trainer ----


def by_shifted_tokens(labels, window):
    counts = [int((other[..., 1:] != -100).sum()) for other in window]
    return int((labels[..., 1:] != -100).sum()) / sum(counts)


def by_tokens(labels, window):
    return int((labels != -100).sum()) / sum(int((other != -100).sum()) for other in window)


def one(labels, window):  # it passes the number, so it does not divide, and the loss does not divide either
    return 1.0


def mean(labels, window):  # it passes no number, and divides by the micro-batches
    return 1 / len(window)


SPAN = data(start_positions=lambda i, row: i % 5, end_positions=lambda i, row: 5 + i % 5)
TOKEN_LABELS = data(
    labels=lambda i, row: [
        -100 if m == 0 or p < i else t % 3 for p, (t, m) in enumerate(zip(*row.values(), strict=True))
    ]
)
CASES = {
    "causal": (lambda: family("qwen3_moe"), label_rows(), shifted, by_shifted_tokens),
    "masked": (lambda: MaskedLM(family("qwen3_moe").config).train(), label_rows(), unshifted, by_tokens),
    "encoder-decoder": (
        lambda: with_loss_function(unshifted_function, is_encoder_decoder=True),
        label_rows(),
        unshifted,
        by_tokens,
    ),
    "sequence classification": (
        lambda: classifier(AutoModelForSequenceClassification, num_labels=3),
        data(labels=lambda i, row: i % 3),
        by_row,
        one,
    ),
    "regression": (
        lambda: classifier(AutoModelForSequenceClassification, num_labels=1),
        data(labels=lambda i, row: i / 4),
        squared_error,
        one,
    ),
    "token classification": (
        lambda: classifier(AutoModelForTokenClassification, num_labels=3),
        TOKEN_LABELS,
        unshifted,
        one,
    ),
    "question answering": (lambda: classifier(AutoModelForQuestionAnswering), SPAN, by_span, mean),
    "ignoring": (Ignoring, label_rows(), unshifted, one),
    "ignoring, a tuple": (IgnoringTuple, label_rows(), unshifted, one),
    "guarding": (Guarding, label_rows(), unshifted, one),
    "summing": (Summing, label_rows(), unshifted, by_tokens),
    "ignoring function": (lambda: with_loss_function(ignoring_function), label_rows(), unshifted, one),
    "summing function": (lambda: with_loss_function(summing_function), label_rows(), shifted, by_shifted_tokens),
}


def model_of(case):
    torch.manual_seed(0)
    return CASES[case][0]().train()


def by_hand(model, data, task, factor, strategy=(LOSS,)):
    """The gradients of the first step."""
    balance = equipoise.attach(model, *strategy)
    window = batches(data)[:ACCUMULATED]
    all_labels = [batch.get("labels") for batch in window]
    captured = []
    inner = model.model if isinstance(model, Inner) else model
    inner.register_forward_hook(lambda module, args, output: captured.append(output))
    for batch, labels in zip(window, all_labels, strict=True):
        inner({**batch}["input_ids"], attention_mask=batch["attention_mask"])
        loss = task(captured.pop(), batch) + balance.loss()
        (factor(labels, all_labels) * loss).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_trainer(model, data, strategy=(LOSS,), **options):
    watch = Watch()
    callback = EquipoiseCallback(*strategy)
    options = dict(gradient_accumulation_steps=ACCUMULATED, remove_unused_columns=False) | options
    trained = train(model, data, [callback, watch], **options)
    assert trained.state.global_step == 2 and callback.balance.num_windows == 2
    return watch.gradients[0]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_that_of_both_losses_with_the_same_factor(case):
    _, data, task, factor = CASES[case]
    model = model_of(case)
    expected = by_hand(copy.deepcopy(model), data, task, factor)
    task_only = by_hand(copy.deepcopy(model), data, task, factor, strategy=("none",))
    assert distance(by_trainer(model, data), expected) < 1e-6
    assert distance(task_only, expected) > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["token classification", "summing"])
def test_a_compiled_model_has_the_same_gradient(case):
    """What the loss uses is measured in a forward of its own, which counts nothing and draws no number."""
    _, data, task, factor = CASES[case]
    model = model_of(case)
    expected = by_hand(copy.deepcopy(model), data, task, factor)
    ours = by_trainer(model, data, torch_compile=True, torch_compile_backend="aot_eager")
    torch.compiler.reset()
    assert distance(ours, expected) < 1e-6


def test_the_number_is_watched_in_the_first_forward_only():
    kinds = []

    class Kind(Summing):
        def forward(self, *args, num_items_in_batch=None, **kwargs):
            kinds.append((type(num_items_in_batch), num_items_in_batch.requires_grad))
            return super().forward(*args, num_items_in_batch=num_items_in_batch, **kwargs)

    by_trainer(Kind(), label_rows())
    assert [kind is torch.Tensor and not requires_grad for kind, requires_grad in kinds] == [False, True, True, True]


@pytest.mark.parametrize(
    "read", [float, int, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.detach, torch.Tensor.long]
)
def test_a_number_that_is_read_past_autograd_is_refused(read):
    class Other(Reading):
        pass

    Other.read = staticmethod(read)
    with pytest.raises(UsageError, match=r"(?s)must use num_items_in_batch as a tensor.*accepts_loss_kwargs = False"):
        by_trainer(Other(), label_rows())
    model = Other()
    model.accepts_loss_kwargs = False  # as it advises
    expected = by_hand(copy.deepcopy(model), label_rows(), unshifted, mean)
    assert distance(by_trainer(model, label_rows()), expected) < 1e-6


class DividingTrainer(Trainer):
    """Passes no number, and takes a mean over micro-batches: as older Trainers do."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs)["loss"]


def test_a_compute_loss_that_keeps_the_number_back_weighs_by_micro_batches():
    model = model_of("causal")
    expected = by_hand(copy.deepcopy(model), label_rows(), shifted, mean)
    assert distance(by_trainer(model, label_rows(), kind=DividingTrainer), expected) < 1e-6


class IntegerTrainer(Trainer):
    """Hands over a plain number."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, int(num_items_in_batch))


@pytest.mark.parametrize("case", ["causal", "token classification"])
def test_a_plain_number_is_watched_too(case):
    _, data, task, factor = CASES[case]
    model = model_of(case)
    expected = by_hand(copy.deepcopy(model), data, task, factor)
    assert distance(by_trainer(model, data, kind=IntegerTrainer), expected) < 1e-6


def test_a_strategy_without_a_loss_watches_nothing():
    model = Reading()
    callback = EquipoiseCallback("loss-free")
    train(model, label_rows(), [callback], gradient_accumulation_steps=ACCUMULATED, remove_unused_columns=False)
    assert callback.balance.num_windows == 2
