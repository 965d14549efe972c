"""An audit reads its share of every domain, once, and says where there was too little."""

import json

import models
import pytest
import torch

from equipoise import EquipoiseError, UsageError
from equipoise_lab.audit.run import CutShort, audit_model
from equipoise_lab.experts.result import summarise


class Quiet:
    def __init__(self):
        self.said, self.seen = [], []

    def say(self, text):
        self.said.append(text)

    def done(self, tokens, of):
        self.seen.append((tokens, of))


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
    quiet = Quiet()
    return audit_model(model, _encode, text, quiet, **{"length": 32, "batch": 4, "end": 1} | options), quiet


def test_every_domain_gives_its_share_of_the_tokens(model, text):
    found, quiet = _audit(model, text, tokens=1000)
    watched = found.watched
    assert watched.domains == ("law", "verse") and watched.num_tokens.tolist() == [15 * 32] * 2
    for layer in watched.layers:
        assert layer.load.sum(-1).tolist() == [15 * 32 * 2] * 2
        assert layer.together.diagonal().tolist() == layer.load.sum(0).tolist()
    assert watched.occurrences.sum() == 2 * 15 * 32, "every token that occurs is told apart"
    assert set(found.nats) == {"law", "verse"} and found.notes == ()
    assert quiet.seen[-1] == (960, 960) and model.training


def test_the_loss_is_the_models_own(model, text):
    rows = []
    hook = model.register_forward_pre_hook(
        lambda module, args, given: rows.append(given["input_ids"]), with_kwargs=True
    )
    found, _ = _audit(model, text, tokens=448, batch=1)
    hook.remove()
    again, _ = _audit(model, text, tokens=448, batch=4)  # seven rows of a domain: four and three
    with torch.no_grad():
        losses = [float(model(input_ids=row, labels=row).loss) for row in rows]
    assert found.nats == pytest.approx({"law": sum(losses[:7]) / 7, "verse": sum(losses[7:]) / 7}, rel=1e-5)
    assert again.nats == pytest.approx(found.nats, rel=1e-5) and len(rows) == 14
    assert all(2 < value < 6 for value in found.nats.values())
    assert torch.equal(found.watched.layers[0].load, again.watched.layers[0].load)


def test_few_tokens_and_none_are_said(model, text):
    (text / "short.txt").write_text("ab\n\ncd")
    (text / "few.txt").write_text("\n\n".join("abcdef" * 5 + str(n) for n in range(4)))
    audited, _ = _audit(model, text, tokens=4 * 4000)
    assert audited.watched.num_tokens.tolist()[0] == 128
    found = summarise(audited, str)
    assert found["few_tokens"] == ["few"] and found["left_out"] == ["short"] and "short" not in found["nats"]
    assert "short fills no row of 32 tokens: it is left out" in found["notes"]
    assert "fewer than 2000 tokens of few: what is said of such a domain is uncertain" in found["notes"]


def test_tokens_that_do_not_fit_into_memory_are_not_told_apart(model, text, monkeypatch):
    monkeypatch.setattr("equipoise_lab.experts.watch.MOST_CELLS", 5 * 16)
    found, _ = _audit(model, text, tokens=1000)
    assert len(found.watched.vocabulary) == 5 and "rare tokens are not told apart" in found.notes[0]
    assert 0 < found.watched.occurrences.sum() < found.watched.num_tokens.sum()


def test_what_cannot_be_is_refused(model, tmp_path, text):
    for wrong in ({"tokens": 0}, {"length": 1}, {"batch": 0}):
        with pytest.raises(UsageError, match="tokens and batch must be at least 1, length 2"):
            _audit(model, text, **wrong)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("abc")
    with pytest.raises(UsageError, match="must fill a row of 32 tokens in some domain"):
        _audit(model, tmp_path / "empty")
    with pytest.raises(UsageError, match="does not exist"):
        _audit(model, tmp_path / "nowhere")


def test_a_whole_audit_can_be_summarised(text):
    audited, _ = _audit(models.family("qwen3_moe"), text, tokens=2000)
    found = summarise(audited, str)
    assert len(found["layers"]) == 2 and set(found["nats"]) == {"law", "verse"}
    assert 0.25 <= found["mean"]["topk_score_sum"] <= 1 and 0 < found["mean"]["router_entropy"] <= 1
    for layer in found["layers"]:
        assert sum(layer["load"]) == 2 * sum(found["tokens"].values())
        assert [sum(share for _, share in row) for row in layer["partners"]] == pytest.approx([1.0] * 8, abs=0.01)
    json.dumps(found, allow_nan=False)


class Stops(Quiet):
    """Fails after some batches."""

    def __init__(self, error, after):
        super().__init__()
        self.error, self.after = error, after

    def done(self, tokens, of):
        super().done(tokens, of)
        if len(self.seen) == self.after:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("no disk"), EquipoiseError("a bad file")])
def test_what_was_counted_before_an_end_is_kept_and_is_right(model, text, error):
    options = {"tokens": 1000, "length": 32, "batch": 4, "end": 1}
    with pytest.raises(CutShort) as cut:
        audit_model(model, _encode, text, Stops(error, 6), **options)  # four batches of law fill its share
    assert cut.value.reason is error and model.training and not model._forward_hooks
    found = summarise(cut.value.audited, str)
    whole, _ = _audit(model, text, tokens=1000)
    assert found["complete"] is False and found["tokens"] == {"law": 15 * 32, "verse": 8 * 32}
    reason = "it was stopped" if isinstance(error, KeyboardInterrupt) else str(error)
    assert found["notes"][0] == f"not complete: ended within verse, after 736 of 960 tokens: {reason}"
    assert found["nats"]["law"] == whole.nats["law"]
    for ours, theirs in zip(found["layers"], whole.watched.layers, strict=True):
        assert ours["load_by_domain"][0] == theirs.load[0].tolist() and sum(ours["load_by_domain"][1]) == 2 * 8 * 32


def test_domains_that_were_not_begun_are_named(model, text):
    (text / "a.txt").write_text((text / "law.txt").read_text())
    with pytest.raises(CutShort) as cut:
        _ = audit_model(model, _encode, text, Stops(KeyboardInterrupt(), 1), tokens=900, length=32, batch=4)
    found = summarise(cut.value.audited, str)
    assert found["domains"] == ["a"] and found["left_out"] == ["law", "verse"]
    assert found["notes"][0].startswith("not complete: ended within a, after 128 of 864 tokens, law, verse not begun:")


def test_a_batch_that_gives_nan_is_not_counted(model, text):
    calls = []

    def poison(module, args, output):
        calls.append(1)
        return output * float("nan") if len(calls) == 3 else output

    model.model.embed_tokens.register_forward_hook(poison)
    with pytest.raises(CutShort, match="must give finite logits") as cut:
        _audit(model, text, tokens=1000)
    assert cut.value.audited.watched.num_tokens.tolist() == [8 * 32, 0]
    assert cut.value.audited.watched.layers[0].load.sum() == 2 * 8 * 32


def test_before_the_first_batch_an_error_is_itself(model, text):
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * float("nan"))
    with pytest.raises(EquipoiseError, match="must give finite logits"):
        _audit(model, text)
    with pytest.raises(EquipoiseError, match="it gives the token id 99, and the model knows 64 tokens"):
        audit_model(model, lambda t: [99] * len(t), text, Quiet(), length=32)

    def no_room(module, args):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory.\nmore")

    model.register_forward_pre_hook(no_room)
    with pytest.raises(EquipoiseError, match=r"must run on 4 rows of 32 tokens: it says RuntimeError.*memory. Take"):
        _audit(model, text)
