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


# ---- losses that are not the model's ----


def smoothed(output, batch):
    logits = output.logits[:, :-1].float().flatten(0, 1)
    return cross_entropy(logits, batch["labels"][:, 1:].flatten(), label_smoothing=0.1)


def by_log_probs(output, batch):
    return -output.logits.float().log_softmax(-1).mean()


def summed_over_all(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    return cross_entropy(logits, labels, reduction="sum") / num_items_in_batch


def mean_of_its_own(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())


class OfLogits(Trainer):
    """Keeps the labels back, and N: each micro-batch is a mean, and nobody divides by their number."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return mean_of_its_own(model(**inputs), labels)


class OfLogitsByNumber(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return summed_over_all(model(**inputs), labels, num_items_in_batch)


class OfLogProbs(Trainer):
    """As the trainers of TRL: says that the Trainer must divide."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return -model(**inputs).logits.float().log_softmax(-1).mean()


class Scaled(OfLogProbs):
    """As GRPO of TRL: has divided already."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs) / self.current_gradient_accumulation_steps


class Halving(Trainer):
    """Weighs the model's loss, and multiplies in place."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss *= 0.5
        return loss


class Detached(Trainer):
    """Two forwards; the first is only looked at."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        with torch.no_grad():
            model(**inputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def times_half(factor):
    return lambda labels, window: factor(labels, window) / 2


FUNCTION = dict(trainer_options=dict(compute_loss_func=summed_over_all))
OTHER_LOSSES = {
    "label smoothing": (dict(label_smoothing_factor=0.1), smoothed, by_shifted_tokens),
    "compute_loss_func": (FUNCTION, shifted, by_shifted_tokens),
    "compute_loss_func, a mean": (dict(trainer_options=dict(compute_loss_func=mean_of_its_own)), shifted, one),
    "logits, by micro-batch": (dict(kind=OfLogits), shifted, one),
    "logits, by the number": (dict(kind=OfLogitsByNumber), shifted, by_shifted_tokens),
    "log-probabilities": (dict(kind=OfLogProbs), by_log_probs, mean),
    "scaled": (dict(kind=Scaled), by_log_probs, mean),
    "half of the model's": (dict(kind=Halving), shifted, times_half(by_shifted_tokens)),
    "a forward without gradients before": (dict(kind=Detached), shifted, by_shifted_tokens),
}


@pytest.mark.parametrize("case", OTHER_LOSSES)
def test_a_loss_that_is_not_the_models_has_the_balancing_loss_beside_it(case):
    options, task, factor = OTHER_LOSSES[case]
    model = model_of("causal")
    expected = by_hand(copy.deepcopy(model), label_rows(), task, factor)
    task_only = by_hand(copy.deepcopy(model), label_rows(), task, factor, strategy=("none",))
    assert distance(by_trainer(model, label_rows(), **options), expected) < 1e-6
    assert distance(task_only, expected) > 1e-3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["compute_loss_func", "logits, by the number"])
def test_a_compiled_model_has_the_same_gradient_under_a_loss_of_ones_own(case):
    options, task, factor = OTHER_LOSSES[case]
    model = model_of("causal")
    expected = by_hand(copy.deepcopy(model), label_rows(), task, factor)
    ours = by_trainer(model, label_rows(), **options, torch_compile=True, torch_compile_backend="aot_eager")
    torch.compiler.reset()
    assert distance(ours, expected) < 1e-6


class ReadingTrainer(OfLogitsByNumber):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch.item())


def test_a_compute_loss_that_reads_the_number_past_autograd_is_refused():
    with pytest.raises(UsageError, match="the model or compute_loss reads it as a plain number"):
        by_trainer(model_of("causal"), label_rows(), kind=ReadingTrainer)


class PairTrainer(Trainer):
    """One loss from two forwards, as of a chosen and a rejected answer."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        first, second = ({key: value[row : row + 1] for key, value in inputs.items()} for row in (0, 1))
        return model(**first).loss + 2 * model(**second).loss


def test_several_forwards_of_one_loss_are_one_micro_batch():
    """Its balancing loss has the sum of their factors."""
    model, data = model_of("causal"), label_rows()
    other = copy.deepcopy(model)
    ours = by_trainer(model, data, kind=PairTrainer)
    balance = equipoise.attach(other, LOSS)
    for batch in batches(data)[:ACCUMULATED]:
        first, second = ({key: value[row : row + 1] for key, value in batch.items()} for row in (0, 1))
        (other(**first).loss + 2 * other(**second).loss + 3 * balance.loss()).backward()
    assert distance(ours, {name: p.grad for name, p in other.named_parameters() if p.grad is not None}) < 1e-6


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
