"""An audit reads its share of every domain once, and notes where there was too little text."""

import json

import models
import pytest
import torch

from equipoise import EquipoiseError, UsageError
from equipoise_lab.audit.run import IncompleteAudit, audit_model
from equipoise_lab.experts.result import summarise


class RecordedProgress:
    def __init__(self):
        self.texts, self.steps = [], []

    def say(self, text):
        self.texts.append(text)

    def done(self, tokens, total):
        self.steps.append((tokens, total))


def _encode(text):
    return [3 + ord(letter) % 60 for letter in text]


@pytest.fixture
def text(tmp_path):
    for domain, letters in (("law", "abcdef"), ("verse", "uvwxyz")):
        documents = [letters * 30 + str(n) for n in range(40)]
        (tmp_path / f"{domain}.txt").write_text("\n\n".join(documents))
    return tmp_path


@pytest.fixture
def model():
    return models.family("glm4_moe")


def _audit(model, text, **options):
    progress = RecordedProgress()
    data = audit_model(model, _encode, text, progress, **{"length": 32, "batch": 4, "end": 1} | options)
    return data, progress


def test_every_domain_gives_its_share_of_tokens(model, text):
    data, progress = _audit(model, text, tokens=1000)
    counts = data.counts
    assert counts.domains == ("law", "verse") and counts.num_tokens.tolist() == [15 * 32] * 2
    for layer in counts.layers:
        assert layer.load.sum(-1).tolist() == [15 * 32 * 2] * 2
        assert layer.together.diagonal().tolist() == layer.load.sum(0).tolist()
    assert counts.occurrences.sum() == 2 * 15 * 32, "every token is in the vocabulary"
    assert set(data.nats) == {"law", "verse"} and data.notes == ()
    assert progress.steps[-1] == (960, 960) and model.training


def test_the_loss_equals_the_models_own(model, text):
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"]), with_kwargs=True
    )
    single, _ = _audit(model, text, tokens=448, batch=1)
    hook.remove()
    batched, _ = _audit(model, text, tokens=448, batch=4)  # seven rows of a domain: four and three
    with torch.no_grad():
        losses = [float(model(input_ids=row, labels=row).loss) for row in rows]
    assert single.nats == pytest.approx({"law": sum(losses[:7]) / 7, "verse": sum(losses[7:]) / 7}, rel=1e-5)
    assert batched.nats == pytest.approx(single.nats, rel=1e-5) and len(rows) == 14
    assert all(2 < value < 6 for value in single.nats.values())
    assert torch.equal(single.counts.layers[0].load, batched.counts.layers[0].load)


def test_domains_with_few_tokens_or_none_are_noted(model, text):
    (text / "short.txt").write_text("ab\n\ncd")
    (text / "few.txt").write_text("\n\n".join("abcdef" * 5 + str(n) for n in range(4)))
    data, _ = _audit(model, text, tokens=4 * 4000)
    assert data.counts.num_tokens.tolist()[0] == 128
    summary = summarise(data, str)
    assert summary["few_tokens"] == ["few"] and summary["left_out"] == ["short"] and "short" not in summary["nats"]
    assert "short fills no row of 32 tokens: it is left out" in summary["notes"]
    assert "fewer than 2000 tokens of few: the figures of such a domain are uncertain" in summary["notes"]


def test_rare_tokens_that_do_not_fit_into_memory_are_not_counted_by_token(model, text, monkeypatch):
    monkeypatch.setattr("equipoise_lab.experts.watch.MAX_CELLS", 5 * 16)
    data, _ = _audit(model, text, tokens=1000)
    assert len(data.counts.vocabulary) == 5 and "rare tokens are not counted by token" in data.notes[0]
    assert 0 < data.counts.occurrences.sum() < data.counts.num_tokens.sum()


def test_invalid_options_and_too_little_text_are_refused(model, tmp_path, text):
    for wrong in ({"tokens": 0}, {"length": 1}, {"batch": 0}):
        with pytest.raises(UsageError, match="tokens and batch must be at least 1, length 2"):
            _audit(model, text, **wrong)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("abc")
    with pytest.raises(UsageError, match="must fill a row of 32 tokens in at least one domain"):
        _audit(model, tmp_path / "empty")
    with pytest.raises(UsageError, match="does not exist"):
        _audit(model, tmp_path / "nowhere")


def test_the_summary_of_an_audit_is_consistent(text):
    data, _ = _audit(models.family("qwen3_moe"), text, tokens=2000)
    summary = summarise(data, str)
    assert len(summary["layers"]) == 2 and set(summary["nats"]) == {"law", "verse"}
    assert 0.25 <= summary["mean"]["topk_score_sum"] <= 1 and 0 < summary["mean"]["router_entropy"] <= 1
    for layer in summary["layers"]:
        assert sum(layer["load"]) == 2 * sum(summary["tokens"].values())
        assert [sum(share for _, share in row) for row in layer["partners"]] == pytest.approx([1.0] * 8, abs=0.01)
    json.dumps(summary, allow_nan=False)


class FailingProgress(RecordedProgress):
    """Raises ``error`` after some batches."""

    def __init__(self, error, after):
        super().__init__()
        self.error, self.after = error, after

    def done(self, tokens, total):
        super().done(tokens, total)
        if len(self.steps) == self.after:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no disk"), EquipoiseError("a bad file")])
def test_the_counts_before_an_interruption_are_kept_and_correct(model, text, error):
    options = {"tokens": 1000, "length": 32, "batch": 4, "end": 1}
    with pytest.raises(IncompleteAudit) as incomplete:
        audit_model(model, _encode, text, FailingProgress(error, 6), **options)  # four batches of law fill its share
    assert incomplete.value.reason is error and model.training and not model._forward_hooks
    summary = summarise(incomplete.value.data, str)
    complete, _ = _audit(model, text, tokens=1000)
    assert summary["complete"] is False and summary["tokens"] == {"law": 15 * 32, "verse": 8 * 32}
    reason = "it was stopped" if isinstance(error, KeyboardInterrupt) else str(error)
    assert summary["notes"][0] == f"incomplete: ended in verse after 736 of 960 tokens: {reason}"
    assert summary["nats"]["law"] == complete.nats["law"]
    for ours, theirs in zip(summary["layers"], complete.counts.layers, strict=True):
        assert ours["load_by_domain"][0] == theirs.load[0].tolist() and sum(ours["load_by_domain"][1]) == 2 * 8 * 32


def test_domains_that_were_not_reached_are_named(model, text):
    (text / "a.txt").write_text((text / "law.txt").read_text())
    with pytest.raises(IncompleteAudit) as incomplete:
        audit_model(model, _encode, text, FailingProgress(KeyboardInterrupt(), 1), tokens=900, length=32, batch=4)
    summary = summarise(incomplete.value.data, str)
    assert summary["domains"] == ["a"] and summary["left_out"] == ["law", "verse"]
    assert summary["notes"][0].startswith("incomplete: ended in a after 128 of 864 tokens (law, verse not begun):")


def test_a_batch_that_gives_nan_is_not_counted(model, text):
    num_calls = 0

    def third_is_nan(module, args, output):
        nonlocal num_calls
        num_calls += 1
        return output * float("nan") if num_calls == 3 else output

    model.model.embed_tokens.register_forward_hook(third_is_nan)
    with pytest.raises(IncompleteAudit, match="must give finite logits") as incomplete:
        _audit(model, text, tokens=1000)
    assert incomplete.value.data.counts.num_tokens.tolist() == [8 * 32, 0]
    assert incomplete.value.data.counts.layers[0].load.sum() == 2 * 8 * 32


def test_an_error_in_the_first_batch_is_raised_as_it_is(model, text):
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(EquipoiseError, match="must give finite logits"):
        _audit(model, text)
    with pytest.raises(EquipoiseError, match="it gives token id 99, but the model has only 64 tokens"):
        audit_model(model, lambda t: [99] * len(t), text, RecordedProgress(), length=32)

    def fail(module, args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory.\nmore")

    model.register_forward_pre_hook(fail)
    with pytest.raises(EquipoiseError, match=r"must run on 4 rows of 32 tokens: it raises RuntimeError.*memory. Use"):
        _audit(model, text)
