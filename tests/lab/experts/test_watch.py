"""The counts at the routers of a running model, against plain loops over the routers' outputs."""

import itertools
import math
import os
import signal

import models
import numpy as np
import pytest
import reference
import torch

import equipoise
from equipoise import EquipoiseError
from equipoise.routers.find import find_routers
from equipoise.routing import score
from equipoise_lab.experts.result import AuditData, summarise
from equipoise_lab.experts.watch import choose_vocabulary, watching

DOMAINS = ("law", "verse")


def _ids(seed, rows=2, length=9):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def _record_calls(model):
    """A list that gets (logits, expert_ids) of every router call, in order."""
    calls = []
    for layer in find_routers(model):

        def hook(module, args, output, kind=layer.kind, k=layer.k):
            logits, _, expert_ids = kind.read(output, k)
            calls.append((logits, expert_ids))

        layer.router.register_forward_hook(hook)
    return calls


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe"])
def test_every_sum_equals_a_loop_over_tokens(family):
    model = models.family(family).eval()
    calls = _record_calls(model)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    vocabulary = [5, 17, 40, 63]
    padded = _ids(2)
    padded[0, :4] = torch.tensor([5, 17, 40, 63])  # padding is not counted, whatever its token ids
    batches = [(0, _ids(1), None), (1, padded, mask), (0, _ids(3), None)]
    with torch.no_grad(), watching(model, DOMAINS, vocabulary) as counts:
        for counts.domain, ids, attention in batches:
            model(input_ids=ids, attention_mask=attention)
    assert counts.num_tokens.tolist() == [36, 14]
    score_function = find_routers(model)[0].kind.score_function
    for number, layer in enumerate(counts.layers):
        load = torch.zeros(2, 8, dtype=torch.int64)
        together = torch.zeros(8, 8, dtype=torch.int64)
        by_token = torch.zeros(4, 8, dtype=torch.int64)
        occurrences, score_sum, entropy = [0] * 4, [0.0, 0.0], [0.0, 0.0]
        for (domain, ids, attention), (logits, chosen) in zip(batches, calls[number::2], strict=True):
            scores = score(logits, score_function).double()
            is_token = [1] * 18 if attention is None else attention.reshape(-1).tolist()
            for token, token_id in enumerate(ids.reshape(-1).tolist()):
                if not is_token[token]:
                    continue
                p = (scores[token] / scores[token].sum()).tolist()
                experts = chosen[token].tolist()
                score_sum[domain] += sum(p[e] for e in experts)
                entropy[domain] -= sum(x * math.log(x) for x in p) / math.log(8)
                for e in experts:
                    load[domain, e] += 1
                for a, b in itertools.product(experts, experts):
                    together[a, b] += 1
                if token_id in vocabulary:
                    occurrences[vocabulary.index(token_id)] += 1
                    for e in experts:
                        by_token[vocabulary.index(token_id), e] += 1
        assert torch.equal(layer.load, load) and torch.equal(layer.together, together)
        assert torch.equal(layer.by_token, by_token) and counts.occurrences.tolist() == occurrences
        assert layer.score_sum.tolist() == pytest.approx(score_sum) and layer.entropy.tolist() == pytest.approx(entropy)
        assert (layer.k, layer.num_experts) == (2, 8)


def test_memory_does_not_grow_with_the_text():
    model = models.family("glm4_moe").eval()
    sizes = []
    for rows in (1, 40):
        with torch.no_grad(), watching(model, DOMAINS, range(64)) as counts:
            for seed in range(rows):
                model(input_ids=_ids(seed))
        sizes.append(sum(v.numel() for layer in counts.layers for v in vars(layer).values() if torch.is_tensor(v)))
    assert sizes[0] == sizes[1]


def test_the_model_is_left_unchanged_even_after_an_error():
    model = models.family("glm4_moe").eval()
    before = model(input_ids=_ids(1)).logits
    with pytest.raises(RuntimeError, match="stop"), watching(model, DOMAINS):
        raise RuntimeError("stop")
    assert not model._forward_pre_hooks
    assert all(not module._forward_hooks for module in model.modules())
    assert torch.equal(model(input_ids=_ids(1)).logits, before)


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_top_k_score_sum_equals_the_reference_with_and_without_a_bias(family, steered):
    model = models.family(family).eval()
    layers = find_routers(model)
    if steered:
        bias = torch.tensor([0.9, 0.0, -0.9, 0.3] * 2)
        equipoise.attach(model, "frozen", biases={layer.name: bias for layer in layers})
    calls = _record_calls(model)
    with torch.no_grad(), watching(model, DOMAINS) as counts:
        model(input_ids=_ids(1))
    assert len(calls) == 2
    for layer, (logits, chosen) in zip(counts.layers, calls, strict=True):
        scores = reference.scores(logits.tolist(), layers[0].kind.score_function)
        expected = sum(sum(row[e] for e in ids) / sum(row) for row, ids in zip(scores, chosen.tolist(), strict=True))
        assert float(layer.score_sum[0]) == pytest.approx(expected, rel=1e-6)
        plain = sum(sum(sorted(row)[-2:]) / sum(row) for row in scores)
        assert (expected < plain - 1e-3) == steered


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_top_k_score_sum_is_k_over_e_for_equal_scores_and_one_for_a_certain_softmax(family):
    model = models.family(family).eval()
    for layer in find_routers(model):
        torch.nn.init.zeros_(layer.router.weight)
    with torch.no_grad(), watching(model, DOMAINS) as flat:
        model(input_ids=_ids(1))
    for layer in flat.layers:
        assert float(layer.score_sum[0]) == pytest.approx(18 * 2 / 8) and float(layer.entropy[0]) == pytest.approx(18)
    for layer in find_routers(model):
        torch.nn.init.normal_(layer.router.weight, std=1e4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), watching(model, DOMAINS) as certain:
        model(input_ids=_ids(1))
    for layer, moe_layer in zip(certain.layers, find_routers(model), strict=True):
        total = float(layer.score_sum[0])
        assert total == pytest.approx(18) if moe_layer.kind.score_function == "softmax" else 18 * 2 / 8 < total <= 18


def test_counts_are_exact_under_autocast():
    """A product of matrices in bfloat16 would round a count above 256."""
    model = models.family("glm4_moe").eval()
    with torch.no_grad(), watching(model, DOMAINS, range(64)) as counts, torch.autocast("cpu", torch.bfloat16):
        model(input_ids=_ids(1, rows=9, length=111))
    for layer in counts.layers:
        assert int(layer.load[0].sum()) == int(layer.by_token.sum()) == 2 * 999
        assert layer.by_token.sum(0).tolist() == layer.load[0].tolist() == layer.together.diagonal().tolist()
        assert int(layer.together.sum()) == 4 * 999


def _state(counts):
    return [value.tolist() for value in counts.sums()]


def test_a_forward_without_a_domain_is_not_counted():
    model = models.family("glm4_moe").eval()
    with torch.no_grad(), watching(model, DOMAINS, range(64)) as counts:
        model(input_ids=_ids(1))
        before = _state(counts)
        counts.domain = None
        model(input_ids=_ids(2))
        assert _state(counts) == before
        counts.domain = 1
        model(input_ids=_ids(2))
    assert counts.num_tokens.tolist() == [18, 18]


def test_a_forward_that_raises_is_not_counted_at_all():
    model = models.family("glm4_moe").eval()

    def fail(module, args):
        raise MemoryError("no room")

    with torch.no_grad(), watching(model, DOMAINS, range(64)) as counts:
        model(input_ids=_ids(1))
        before = _state(counts)
        handle = find_routers(model)[1].router.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(input_ids=_ids(2))
        assert _state(counts) == before
        handle.remove()
        model(input_ids=_ids(2))
    assert counts.num_tokens.tolist() == [36, 0] and int(counts.layers[0].load.sum()) == 72


def test_ctrl_c_waits_until_a_forward_is_counted(monkeypatch):
    model = models.family("glm4_moe").eval()
    handler = signal.getsignal(signal.SIGINT)
    searchsorted = torch.searchsorted

    def interrupted_searchsorted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return searchsorted(*args)

    monkeypatch.setattr(torch, "searchsorted", interrupted_searchsorted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), watching(model, DOMAINS, range(64)) as counts:
        model(input_ids=_ids(1))
    assert signal.getsignal(signal.SIGINT) is handler
    for layer in counts.layers:
        assert int(layer.load.sum()) == int(layer.by_token.sum()) == 36


def test_a_router_that_is_not_called_once_with_all_tokens_is_an_error():
    model = models.family("glm4_moe").eval()
    router = find_routers(model)[1].router
    plain = router.forward

    def twice(hidden):
        router._forward_hooks[next(iter(router._forward_hooks))](router, (hidden,), plain(hidden))
        return plain(hidden)

    with torch.no_grad(), watching(model, DOMAINS):
        router.forward = twice
        with pytest.raises(
            EquipoiseError, match=r"called once per forward.*: model\.layers\.1\.mlp\.gate was called twice"
        ):
            model(input_ids=_ids(1))
        router.forward = plain
        hook = router._forward_hooks.popitem()
        router._forward_hooks[hook[0]] = lambda module, args, output: hook[1](module, args, [x[:3] for x in output])
        with pytest.raises(EquipoiseError, match=r"model\.layers\.1\.mlp\.gate was called with 3 of 18 tokens"):
            model(input_ids=_ids(1))


def test_a_router_must_be_called_in_every_forward_or_in_none():
    """A router of images is not called on text. One that is called in some forwards only would have wrong means."""
    model = models.family("glm4_moe").eval()
    router = find_routers(model)[1].router
    with torch.no_grad(), watching(model, DOMAINS) as counts:
        number, hook = router._forward_hooks.popitem()
        model(input_ids=_ids(1))
        assert [int(layer.load.sum()) for layer in counts.layers] == [36, 0]
        summary = summarise(AuditData(counts, {}, ()), str)
        assert [layer["layer"] for layer in summary["layers"]] == ["model.layers.0.mlp.gate"]
        assert "model.layers.1.mlp.gate received no tokens: it is left out" in summary["notes"]
        router._forward_hooks[number] = hook
        with pytest.raises(EquipoiseError, match=r"layers\.1\.mlp\.gate was called in some forwards and not in others"):
            model(input_ids=_ids(1))
    with torch.no_grad(), watching(model, DOMAINS):
        model(input_ids=_ids(1))
        router._forward_hooks.popitem()
        with pytest.raises(EquipoiseError, match=r"layers\.1\.mlp\.gate was called in some forwards and not in others"):
            model(input_ids=_ids(1))


def test_the_vocabulary_is_the_most_frequent_tokens_if_not_all_fit(monkeypatch):
    model = models.family("glm4_moe")
    rows = np.array([[5, 5, 5, 7], [7, 7, 9, 3], [1, 1, 1, 1]])
    assert choose_vocabulary(model, [rows]) == (list(range(64)), []), "all fit, so the text is not read"
    monkeypatch.setattr("equipoise_lab.experts.watch.MAX_CELLS", 10 * 16)  # two layers of eight experts
    assert choose_vocabulary(model, [rows]) == ([1, 5, 7, 9, 3], [])
    monkeypatch.setattr("equipoise_lab.experts.watch.SAMPLE_TOKENS", 8)
    assert choose_vocabulary(model, [rows]) == ([5, 7, 9, 3], []), "it reads no more than SAMPLE_TOKENS of a domain"
    monkeypatch.setattr("equipoise_lab.experts.watch.MAX_CELLS", 2 * 16)
    chosen, notes = choose_vocabulary(model, iter([iter(rows), iter(rows[2:])]))
    assert chosen == [1, 5] and notes == ["3 rare tokens are not counted by token, to bound the memory"]


def test_an_attached_model_is_watched_with_its_biases():
    model = models.family("glm4_moe").eval()
    with torch.no_grad(), watching(model, DOMAINS) as plain:
        model(input_ids=_ids(1))
    names = [layer.name for layer in find_routers(model)]
    favourite = torch.tensor([9.0] + [0.0] * 7)
    equipoise.attach(model, "frozen", biases=dict.fromkeys(names, favourite))
    with torch.no_grad(), watching(model, DOMAINS) as steered:
        model(input_ids=_ids(1))
    assert steered.layers[0].load[0, 0] == 18 > plain.layers[0].load[0, 0]


def test_invalid_models_vocabularies_and_inputs_are_refused():
    with pytest.raises(EquipoiseError, match="must hold a router"), watching(torch.nn.Linear(2, 2), DOMAINS):
        pass
    model = models.family("glm4_moe")
    with pytest.raises(ValueError, match="different token ids"), watching(model, DOMAINS, [1, 1]):
        pass
    with pytest.raises(EquipoiseError, match="must get input_ids"), watching(model, DOMAINS):
        model(inputs_embeds=torch.zeros(1, 3, 32))
