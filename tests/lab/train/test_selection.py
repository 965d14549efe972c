"""Selections other than top-k: what they choose, what the experts compute, what is counted, and which ones leak."""

import json
import math

import pytest
import torch

from equipoise.attachment import attach
from equipoise.errors import EquipoiseError, UsageError
from equipoise.routers.find import find_routers
from equipoise_lab.records import Run, read_json, write_json
from equipoise_lab.train.loop import train
from equipoise_lab.train.models import build_model
from equipoise_lab.train.selection import expert_choice, hash_table, install_selection, parse_selection, sinkhorn

CHOICES = ["expert-choice", "expert-choice:chunk=8", "expert-choice:chunk=8,shuffled=true", "sinkhorn", "hash"]
VOCAB = 300


def _rows(folder, log="steps"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows(log)]


def _without_times(result):
    return {key: value for key, value in result.items() if key != "tokens_per_second"}


def _draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def model(tiny):
    def build(selection, **options):
        built = build_model(tiny(strategy="none", selection=selection, layers=2, **options), VOCAB).train()
        with torch.no_grad():  # routers with clear preferences
            for _, router, _, *_ in find_routers(built):
                router.weight.mul_(50)
        install_selection(built, selection)
        return built

    return build


def _ids(seed=0, rows=2, length=16):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


# ---- expert choice ----


def test_expert_choice_matches_a_hand_calculation():
    scores = torch.tensor([[0.9, 0.8], [0.2, 0.6], [0.5, 0.1], [0.4, 0.7]])
    tokens, experts = expert_choice(scores, k=1)  # each expert takes 4 * 1 / 2 = 2 tokens
    assert tokens.tolist() == [0, 2, 0, 3], "token 0 is taken twice, token 1 by no expert"
    assert experts.tolist() == [0, 0, 1, 1]
    tokens, experts = expert_choice(scores, k=1, chunk=2)  # each expert takes 1 of {0, 1} and 1 of {2, 3}
    assert tokens.tolist() == [0, 0, 2, 3]
    assert experts.tolist() == [0, 1, 0, 1]


def _reference(scores, k, members):
    """The (token, expert) pairs, computed by sorting every chunk. Shares no code with the implementation."""
    pairs = set()
    for chunk in members:
        take = len(chunk) * k // len(scores[0])
        for expert in range(len(scores[0])):
            best = sorted(chunk, key=lambda token: -scores[token][expert])
            pairs |= {(token, expert) for token in best[:take]}
    return pairs


@pytest.mark.parametrize(("chunk", "shuffled"), [(None, False), (24, False), (8, False), (8, True), (12, True)])
def test_expert_choice_matches_the_reference(chunk, shuffled):
    scores = _draw(24, 4).sigmoid()
    tokens, experts = expert_choice(scores, 2, chunk, shuffled)
    order, size = list(range(24)), chunk or 24
    if shuffled:
        order = torch.randperm(24, generator=torch.Generator().manual_seed(2106 + 24)).tolist()
        assert order != sorted(order)
    members = [order[begin : begin + size] for begin in range(0, 24, size)]
    pairs = list(zip(tokens.tolist(), experts.tolist(), strict=True))
    assert len(pairs) == len(set(pairs)) == 24 * 2
    assert set(pairs) == _reference(scores.tolist(), 2, members)
    for chunk_of in members:  # every expert takes equally many tokens of every chunk
        counts = [sum(1 for t, e in pairs if e == expert and t in chunk_of) for expert in range(4)]
        assert counts == [size * 2 // 4] * 4


@pytest.mark.parametrize("selection", CHOICES)
def test_the_layer_output_is_the_weighted_sum_over_chosen_experts(model, selection):
    """The expected output is computed token by token in float64, from the logits of the router."""
    model = model(selection)
    layer, ids, seen = model.model.layers[1].mlp, _ids(), {}
    layer.gate.register_forward_hook(lambda m, a, out: seen.update(router=out))
    layer.experts.register_forward_hook(lambda m, a, out: seen.update(hidden=a[0].detach().double(), output=out))
    model(input_ids=ids, use_cache=False)
    logits = seen["router"][0]
    hidden, scores = seen["hidden"], logits.double().sigmoid().tolist()
    into, out_of = layer.experts.gate_up_proj.detach().double(), layer.experts.down_proj.detach().double()
    name, _, options = selection.partition(":")
    if name == "expert-choice":
        order = list(range(32))
        if "shuffled" in options:
            order = torch.randperm(32, generator=torch.Generator().manual_seed(2106 + 32)).tolist()
        size = 8 if "chunk" in options else 32
        pairs = _reference(scores, 2, [order[begin : begin + size] for begin in range(0, 32, size)])
        chosen = [[e for e in range(4) if (t, e) in pairs] for t in range(32)]
        assert {len(experts) for experts in chosen} - {2}, "every token has two experts, as in top-k"
    elif name == "hash":
        chosen = [hash_table(VOCAB, 2, 4, 1)[token].tolist() for token in ids.flatten().tolist()]
    else:
        chosen = _loop_sinkhorn(logits.tolist(), 20)
        chosen = [sorted(range(4), key=lambda e, row=row: -row[e])[:2] for row in chosen]
    expected = torch.zeros_like(hidden)
    for t in range(32):
        for e in chosen[t]:
            gate, up = (into[e] @ hidden[t]).chunk(2)
            share = scores[t][e] / sum(scores[t][j] for j in chosen[t])
            expected[t] += share * (out_of[e] @ (torch.nn.functional.silu(gate) * up))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(seen["output"].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_reaches_router_and_experts(model):
    model = model("expert-choice:chunk=8")
    model(input_ids=_ids(), use_cache=False).logits.square().sum().backward()
    layer = model.model.layers[0].mlp
    for weight in (layer.gate.weight, layer.experts.gate_up_proj, layer.experts.down_proj):
        assert weight.grad.abs().sum(tuple(range(1, weight.dim()))).min() > 0, "an expert got no gradient"


@pytest.mark.parametrize(("selection", "leaks"), [*zip(CHOICES, [True] * 4 + [False], strict=True), ("top-k", False)])
def test_which_selections_depend_on_later_tokens(model, selection, leaks):
    model, ids = model(selection), _ids()
    other = ids.clone()
    other[:, 12:] = (other[:, 12:] + 7) % VOCAB

    def same():
        with torch.no_grad():
            one, two = (model(input_ids=x, use_cache=False).logits[:, :12] for x in (ids, other))
        return torch.allclose(one, two, rtol=1e-5, atol=1e-6)

    assert same() != leaks
    model.eval()
    assert same(), "the evaluation is not causal"


@pytest.mark.parametrize("selection", ["expert-choice", "sinkhorn"])
def test_an_evaluation_is_plain_top_k(model, selection):
    selecting, plain = model(selection).eval(), model("top-k").eval()
    assert plain.model.layers[0].mlp.gate.__class__.__mro__[1] is torch.nn.Module, "top-k changed the router"
    with torch.no_grad():
        assert torch.equal(*(m(input_ids=_ids(), use_cache=False).logits for m in (selecting, plain)))
        selecting.train()
        assert not torch.equal(*(m(input_ids=_ids(), use_cache=False).logits for m in (selecting, plain)))


def test_a_router_called_by_itself_behaves_as_in_its_family(model):
    """So attach tests the plain router. Inside the model the selection acts, before attach and afterwards."""
    model = model("expert-choice")
    router = model.model.layers[0].mlp.gate
    hidden = _draw(32, 32).float()
    expected = router.weight @ hidden.T
    assert torch.equal(router(hidden)[2].sort().values, expected.T.topk(2).indices.sort().values)
    for _ in range(2):  # attach works a second time too
        balance = attach(model, "none")
        model(input_ids=_ids(), use_cache=False)
        balance.step()
        assert [load.tolist() for load in balance.load.values()] == [[16] * 4] * 2
        balance.detach()
    model(input_ids=_ids(), use_cache=False)
    assert router._selection.token_ids is None, "the experts did not use the token ids of the router"
    assert torch.equal(router(hidden)[2].sort().values, expected.T.topk(2).indices.sort().values), (
        "also after a forward"
    )


# ---- Sinkhorn and hash ----


def test_sinkhorn_matches_a_hand_calculation():
    logits = torch.tensor([[4.0, 1.0], [1.0, 1.0]]).log()  # rows: /5, /2; columns then sum to 1.3 and 0.7 instead of 1
    expected = torch.tensor([[0.8 / 1.3, 0.2 / 0.7], [0.5 / 1.3, 0.5 / 0.7]], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(logits.double(), 1), expected)


def _loop_sinkhorn(logits, iterations):
    m = [[math.exp(z) for z in row] for row in logits]
    for _ in range(iterations):
        m = [[x / sum(row) for x in row] for row in m]
        sums = [sum(row[e] for row in m) * len(m[0]) / len(m) for e in range(len(m[0]))]
        m = [[x / sums[e] for e, x in enumerate(row)] for row in m]
    return m


def test_sinkhorn_is_finite_for_an_expert_with_tiny_scores():
    logits = torch.zeros(4, 3)
    logits[:, 2] = -800.0
    assert sinkhorn(logits).isfinite().all()


def test_sinkhorn_matches_the_reference_and_has_even_marginals():
    logits = 3 * _draw(40, 8)
    for iterations in (1, 3):
        expected = torch.tensor(_loop_sinkhorn(logits.tolist(), iterations), dtype=torch.float64)
        torch.testing.assert_close(sinkhorn(logits, iterations), expected, rtol=1e-10, atol=0)
    matrix = sinkhorn(logits, 300)
    torch.testing.assert_close(matrix.sum(1), torch.ones(40, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(matrix.sum(0), torch.full((8,), 5.0, dtype=torch.float64), rtol=1e-10, atol=0)
    assert sinkhorn(1e4 * logits.float()).isfinite().all()


def test_a_hash_is_fixed_and_distinct_and_differs_by_layer(model):
    tables = [hash_table(VOCAB, 2, 4, layer) for layer in (0, 1)]
    assert not tables[0].equal(tables[1])
    for table in tables:
        assert (table[:, 0] != table[:, 1]).all()
        share = table.flatten().bincount(minlength=4) / (2 * VOCAB)
        assert (share - 0.25).abs().max() < 0.05
    hash_table.cache_clear()
    assert hash_table(VOCAB, 2, 4, 1).equal(tables[1]), "a second draw differs"
    model, ids = model("hash"), _ids()
    for training in (True, False):
        model.train(training)
        for number, layer in enumerate(model.model.layers):
            seen = []
            handle = layer.mlp.gate.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[2]))
            model(input_ids=ids, use_cache=False)
            handle.remove()
            assert seen[0].equal(tables[number][ids.flatten()])


# ---- runs ----


@pytest.mark.parametrize("selection", CHOICES)
def test_every_selection_trains_is_evaluated_and_recorded(tiny, new_watcher, selection):
    config = tiny(steps=3, strategy="none", selection=selection, save_model=False, evaluate_every=2)
    result = train(config, new_watcher())
    run = Run(config.out)
    assert run.config["options"]["selection"] == selection
    assert run.config["strategy"] == result["strategy"] == f"none, selection {selection}"
    loads = [layer for row in run.rows("loads") for layer in row["load"]]
    assert all(sum(layer) == 3 * 2 * 16 * 2 for layer in loads)
    assert all(len(set(layer)) == 1 for layer in loads) == selection.startswith("expert-choice")
    for row in run.rows("evaluations"):
        assert 0 < row["topk_score_sum"] <= 1
        assert all(sum(layer) == domain["tokens"] * 2 for domain in row["domains"].values() for layer in domain["load"])


def test_hash_selection_is_evaluated_by_its_own_choice(tiny, new_watcher):
    config = tiny(steps=1, strategy="none", selection="hash", save_model=False)
    train(config, new_watcher())
    row = _rows(config.out, "evaluations")[-1]
    assert row["topk_score_sum"] == pytest.approx(0.5, abs=0.02), "must be k/E, because scores do not choose"


@pytest.mark.parametrize("selection", ["expert-choice:chunk=16,shuffled=true", "sinkhorn", "hash"])
def test_a_stopped_run_resumes_bit_for_bit(tiny, new_watcher, tmp_path, selection):
    options = {"strategy": "none", "then": "z", "switch_at": 6, "steps": 8, "checkpoint_every": 2}
    options |= {"selection": selection, "save_model": False}
    whole = train(tiny(out=tmp_path / "whole", **options), new_watcher())
    for stop_after, done in ((5, 4), (7, 6)):
        cut = tmp_path / str(stop_after)
        with pytest.raises(KeyboardInterrupt):
            train(tiny(out=cut, **options), new_watcher(stop_after))
        watcher = new_watcher()
        resumed = train(tiny(out=cut, **options, resume=True), watcher)
        assert watcher.done == done
        assert _without_times(resumed) == _without_times(whole)
        for log in ("steps", "loads", "evaluations"):
            assert _rows(cut, log) == _rows(tmp_path / "whole", log)


def test_a_saved_expert_choice_model_routes_as_in_evaluation(tiny, new_watcher):
    from transformers import AutoModelForCausalLM

    config = tiny(steps=2, strategy="none", selection="expert-choice")
    train(config, new_watcher())
    saved = AutoModelForCausalLM.from_pretrained(config.out / "model").eval()
    again = build_model(config, saved.config.vocab_size)
    install_selection(again, config.selection)
    again.load_state_dict(saved.state_dict())
    with torch.no_grad():
        one, two = (m.eval()(input_ids=_ids() % 200, use_cache=False).logits for m in (saved, again))
    torch.testing.assert_close(one, two)


def test_a_folder_older_than_the_options_resumes_with_their_defaults(tiny, new_watcher):
    config = tiny(steps=2)
    result = train(config, new_watcher())
    facts = read_json(config.out / "config.json")
    for name in ("selection", "score_function"):
        del facts["options"][name]
    write_json(config.out / "config.json", facts)
    assert train(tiny(steps=2, resume=True), new_watcher()) == result
    with pytest.raises(EquipoiseError, match="has selection='top-k', got 'sinkhorn'"):
        train(tiny(steps=2, strategy="none", selection="sinkhorn", resume=True), new_watcher())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection": "magic"}, "must be one of top-k, expert-choice, sinkhorn, hash: got 'magic'"),
        ({"selection": "expert-choice:size=3"}, r"must be chunk=\.\.\. or shuffled=\.\.\., given once: got 'size=3'"),
        ({"selection": "hash:seed=3"}, "must be left out: it has none, given once: got 'seed=3'"),
        ({"selection": "expert-choice:chunk=8,chunk=8"}, "once: got 'chunk=8'"),
        ({"selection": "expert-choice:chunk=0"}, "chunk must be at least 1: got 0"),
        ({"selection": "expert-choice:shuffled=yes"}, "shuffled must be true or false: got 'yes'"),
        ({"selection": "sinkhorn:iterations=1.5"}, "iterations must be a whole number: got '1.5'"),
        (
            {"selection": "expert-choice:chunk=5"},
            "chunk must divide the number of tokens in a router call: got 5 and 32",
        ),
        ({"selection": "expert-choice:chunk=1"}, r"tokens \* k / experts must be a whole number: got 1 \* 2 / 4"),
        ({"selection": "sinkhorn", "arch": "olmoe"}, "needs --arch glm4_moe: got olmoe"),
        ({"selection": "sinkhorn", "strategy": "loss-free"}, "needs the strategy none or z: got loss-free"),
        ({"selection": "sinkhorn", "strategy": "z+lbl"}, "needs the strategy none or z: got z[+]lbl"),
        ({"selection": "sinkhorn", "then": "lbl", "switch_at": 3}, "needs the strategy none or z: got lbl"),
        ({"selection": "hash", "save_model": True}, "hash needs --no-save-model"),
        (
            {"selection": "sinkhorn", "score_function": "softmax"},
            "needs sigmoid scores: got --score-function softmax",
        ),
        (
            {"score_function": "softmax", "arch": "deepseek_v3"},
            "--score-function softmax needs --arch glm4_moe: got deepseek_v3",
        ),
        (
            {"score_function": "sigmoid", "arch": "mixtral"},
            "--score-function sigmoid needs --arch glm4_moe: got mixtral",
        ),
        ({"score_function": "softmax", "save_model": True}, "--score-function softmax needs --no-save-model"),
        ({"score_function": "softmax", "experts_per_token": 1}, "needs at least two experts per token"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(tiny, new_watcher, options, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(**{"strategy": "none", "save_model": False, **options}), new_watcher())
    assert not tiny().out.exists()


def test_selection_and_score_function_are_refused_with_a_model_folder(tiny, new_watcher, tmp_path):
    write_json(tmp_path / "config.json", {})
    for options in ({"selection": "sinkhorn"}, {"score_function": "softmax"}):
        with pytest.raises(UsageError, match="needs --arch glm4_moe: got --model"):
            train(tiny(strategy="none", save_model=False, model=tmp_path, **options), new_watcher())


def test_parse_selection_reads_options():
    selection = parse_selection("expert-choice:shuffled=true,chunk=12")
    assert (selection.chunk, selection.shuffled) == (12, True)
    assert parse_selection("sinkhorn:iterations=3").iterations == 3
    assert parse_selection("top-k") is None


# ---- --score-function ----


def test_runs_of_a_seed_differ_by_the_score_function_only(tiny):
    next_random, built = {}, {}
    for score_function in ("auto", "sigmoid", "softmax"):
        built[score_function] = build_model(tiny(score_function=score_function, save_model=False), VOCAB)
        next_random[score_function] = torch.rand(1)
    states = {score_function: model.state_dict() for score_function, model in built.items()}
    for score_function in ("sigmoid", "softmax"):
        assert states[score_function].keys() == states["auto"].keys()
        assert all(value.equal(states["auto"][name]) for name, value in states[score_function].items())
        assert next_random[score_function] == next_random["auto"], "the change used random numbers"
    assert [kind.score_function for model in built.values() for _, _, kind, *_ in find_routers(model)] == [
        "sigmoid",
        "sigmoid",
        "softmax",
    ]
    hidden = _draw(5, 32).float()
    routers = {score_function: find_routers(model)[0][1] for score_function, model in built.items()}
    outputs = {score_function: router(hidden) for score_function, router in routers.items()}
    torch.testing.assert_close(outputs["softmax"][0], outputs["auto"][0])
    chosen = outputs["softmax"][0].softmax(-1).gather(1, outputs["softmax"][2])
    torch.testing.assert_close(outputs["softmax"][1], chosen / chosen.sum(-1, keepdim=True))


def test_softmax_scores_train_and_are_recorded(tiny, new_watcher, tmp_path):
    facts = {}
    for score_function in ("auto", "softmax"):
        config = tiny(out=tmp_path / score_function, score_function=score_function, steps=3, save_model=False)
        result = train(config, new_watcher())
        facts[score_function] = Run(config.out).config
        assert result["strategy"] == config.strategy + ("" if score_function == "auto" else ", score function softmax")
    assert (facts["auto"]["score_function"], facts["softmax"]["score_function"]) == ("sigmoid", "softmax")
    assert facts["auto"]["num_parameters"] == facts["softmax"]["num_parameters"]
    assert json.loads((tmp_path / "softmax" / "result.json").read_text())["steps"] == 3
