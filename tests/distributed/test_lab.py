"""Runs of the lab on several ranks: the same numbers as with one process, and the same errors on every rank."""

import json
import os
import re

import lab_ranks
import pytest
import safetensors.torch
import torch
from lab_ranks import STRATEGY, tiny
from ranks import run_on_ranks

from equipoise_lab.records import Run
from equipoise_lab.train.batches import Batches
from equipoise_lab.train.data import load_corpus
from equipoise_lab.train.ranks import ONE_PROCESS

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for texts and runs."""
    root = tmp_path_factory.mktemp("lab")
    lab_ranks.write_text(root / "text")
    for rank in (0, 1):
        (root / str(rank)).mkdir()
        lab_ranks.write_text(root / str(rank) / "text", 60 + rank)
    (root / "0" / "model").mkdir()
    (root / "0" / "model" / "config.json").write_text("{}")
    before = os.environ.get("EQUIPOISE_CACHE")
    os.environ["EQUIPOISE_CACHE"] = str(root / "cache")
    yield root
    if before is None:
        del os.environ["EQUIPOISE_CACHE"]
    else:
        os.environ["EQUIPOISE_CACHE"] = before


def _alone(root, name, stop_after=None, **options):
    attempt = lab_ranks.attempt(tiny(root, name, **options), ONE_PROCESS, stop_after)
    assert attempt["error"] is None or stop_after, attempt["error"]
    return attempt


@pytest.fixture(scope="module")
def one(root):
    """The runs of one process, which runs on ranks are compared with."""
    loss = "loss-free+lbl:scope=micro_batch"
    return {
        "one": _alone(root, "one", evaluate_every=3, save_model=True),
        "switched": _alone(
            root, "switched", strategy="loss-free:rate=1e-2", then="loss-free:rate=1e-2+lbl", switch_at=4
        ),
        "together": _alone(root, "together", strategy="lbl:scope=micro_batch,coefficient=1", balance_batch=2, steps=3),
        "interleaved": _alone(root, "interleaved", order="interleaved", strategy=loss, steps=3, evaluation_sequences=2),
        "cut": _alone(root, "one cut", 5),
        "qwen": _alone(root, "one qwen", arch="qwen3_moe", steps=2, save_model=True),
    }


@pytest.fixture(scope="module")
def two(root, one):
    """The attempts of two ranks, by rank and name."""
    by_rank = run_on_ranks(2, lab_ranks.two, root)
    for attempts in by_rank:
        assert not isinstance(attempts, str), attempts
    return by_rank


def _rows(folder, log="steps"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows(log)]


def _without_times(result):
    return {key: value for key, value in result.items() if key != "tokens_per_second"}


AT_FORWARD = ("balancing_loss", "load_balancing_loss")  # computed from the counts that a rank knows at each forward


def _assert_close(row, expected, left_out=()):
    assert row.keys() == expected.keys()
    for name in row.keys() - {*left_out, "collectives", "collective_bytes"}:
        # float32, summed in another order. Only counts may be near 0, and they are exact.
        assert row[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@pytest.mark.parametrize("shuffled", [False, True])
def test_ranks_share_the_window_of_one_process_without_overlap(root, num_ranks, shuffled):
    corpus = load_corpus(root / "text", vocab_size=300, sequence_length=16)

    def windows(num, rank):
        batches = Batches(
            corpus,
            sequence_length=16,
            sequences_per_micro_batch=2,
            micro_batches_per_step=12 // num,
            seed=3,
            shuffled=shuffled,
            rank=rank,
            num_ranks=num,
        )
        return [
            (step, m.domain, tuple(m.input_ids.flatten().tolist())) for step in (0, 1) for m in batches.window(step)
        ]

    dealt = [micro for rank in range(num_ranks) for micro in windows(num_ranks, rank)]
    assert sorted(dealt) == sorted(windows(1, 0))
    assert len(dealt) == 24


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_run_on_two_ranks_gives_the_numbers_of_one_process(root, two, wrapper):
    assert two[0][wrapper]["error"] is None, two[0][wrapper]
    assert two[0][wrapper]["result"] == two[1][wrapper]["result"]
    assert two[1][wrapper]["said"] == [], "only rank 0 reports"
    config = Run(root / wrapper).config
    assert (config["wrapper"], config["num_ranks"]) == (wrapper, 2)
    assert (Run(root / "one").config["wrapper"], Run(root / "one").config["num_ranks"]) == ("none", 1)
    assert _rows(root / wrapper, "loads")[0] == _rows(root / "one", "loads")[0]  # before any weight can differ
    for row, expected in zip(_rows(root / wrapper)[:3], _rows(root / "one")[:3], strict=True):
        _assert_close(row, expected, AT_FORWARD)
    evaluations = [_rows(root / name, "evaluations") for name in (wrapper, "one")]
    assert [row["step"] for row in evaluations[0]] == [3, 6, 8, 8]
    for row, expected in zip(*evaluations, strict=True):
        assert row["val_nats"] == pytest.approx(expected["val_nats"], rel=1e-4)  # one choice of an expert may differ
        for name, domain in expected["domains"].items():
            assert row["domains"][name]["tokens"] == domain["tokens"] == 6 * 16
            assert sum(row["domains"][name]["load"][0]) == 6 * 16 * 2, "a batch was counted twice or not at all"
    assert evaluations[0][0]["domains"]["metal"]["load"] == evaluations[1][0]["domains"]["metal"]["load"]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_interleaved_backwards_on_two_ranks_give_the_numbers_of_one_process(root, one, two, wrapper):
    name = f"{wrapper} interleaved"
    assert two[0][name]["error"] is None, two[0][name]
    for row, expected in zip(_rows(root / name), _rows(root / "interleaved"), strict=True):
        _assert_close(row, expected)  # counts of a micro-batch are known at its forward, so balancing losses are equal
    assert two[0][name]["result"]["val_nats"] == pytest.approx(one["interleaved"]["result"]["val_nats"], rel=1e-4)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_switch_of_strategy_on_two_ranks_matches_one_process_and_resumes(root, two, wrapper):
    name = f"{wrapper} switched"
    assert two[0][name]["error"] is None, two[0][name]
    rows = _rows(root / name)
    assert [row["strategy"] for row in rows] == ["loss-free:rate=1e-2"] * 4 + ["loss-free:rate=1e-2+lbl"] * 4
    for row, expected in zip(rows[:6], _rows(root / "switched"), strict=False):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)  # one choice of an expert may differ
    for stop_after, done in ((5, 3), (8, 6)):
        cut = f"{name}, stopped after {stop_after}"
        assert two[0][cut]["error"] is None, two[0][cut]
        assert two[0][cut]["done"] == done
        assert _without_times(two[1][cut]["result"]) == _without_times(two[1][name]["result"])
        assert _rows(root / cut) == rows


@pytest.mark.parametrize(("name", "whole"), [("", "one"), (" interleaved", "interleaved")])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_scores_of_an_evaluation_are_summed_over_the_ranks(root, two, wrapper, name, whole):
    """Two ranks share three batches per domain, or one batch, so that one rank has none."""
    assert two[0][f"{wrapper}{name}"]["error"] is None
    rows, expected_rows = (_rows(root / folder, "evaluations") for folder in (f"{wrapper}{name}", whole))
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row["topk_score_sum"] == pytest.approx(expected["topk_score_sum"], rel=1e-3)
        for domain, figures in expected["domains"].items():
            # one choice of an expert may differ, in 6 or 2 sequences of 16 tokens
            assert row["domains"][domain]["topk_score_sum"] == pytest.approx(figures["topk_score_sum"], rel=1e-3)
    assert two[1][f"{wrapper}{name}"]["result"]["topk_score_sum"] == rows[-1]["topk_score_sum"]


def _assert_equal(actual, expected):
    """Compares nested figures. Counts must be equal; floats may be summed in another order."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for name in expected:
            _assert_equal(actual[name], expected[name])
    elif isinstance(expected, list):
        assert len(actual) == len(expected)
        for actual_item, expected_item in zip(actual, expected, strict=True):
            _assert_equal(actual_item, expected_item)
    else:
        assert actual == (pytest.approx(expected, rel=1e-12) if isinstance(expected, float) else expected)


def test_expert_figures_do_not_depend_on_the_number_of_ranks(root):
    """Under FSDP2 a rank without a batch runs a forward that is not counted."""
    alone = lab_ranks.evaluated(root, ONE_PROCESS)
    one, other = run_on_ranks(2, lab_ranks.evaluated_on_ranks, root)
    assert isinstance(one, dict), one
    assert sorted(one) == ["ddp 2", "ddp 6", "fsdp2 2", "fsdp2 6"]
    for name, (row, audit) in one.items():
        expected_row, expected = alone[f"none {name[-1]}"]
        assert other[name] == (row, audit), "the ranks differ"
        _assert_equal(audit, expected)
        _assert_equal(row, expected_row)
        for number, layer in enumerate(audit["layers"]):
            assert layer["load_by_domain"] == [domain["load"][number] for domain in row["domains"].values()]


def test_every_run_on_ranks_writes_an_audit_of_its_experts(root, two):
    for name in ("ddp", "fsdp2", "ddp interleaved", "fsdp2 interleaved"):
        assert two[0][name]["error"] is None, two[0][name]
        audit, row = json.loads((root / name / "audit.json").read_text()), _rows(root / name, "evaluations")[-1]
        for number, layer in enumerate(audit["layers"]):
            assert layer["load_by_domain"] == [domain["load"][number] for domain in row["domains"].values()]
    for wrapper in ("ddp", "fsdp2"):
        whole, resumed = (
            json.loads((root / name / "audit.json").read_text()) | {"model": ""} for name in (wrapper, f"{wrapper} cut")
        )
        assert resumed == whole


def test_joined_micro_batches_on_ranks_match_one_process(root, two):
    assert two[0]["ddp together"]["error"] is None, two[0]["ddp together"]
    for row, expected in zip(_rows(root / "ddp together"), _rows(root / "together"), strict=True):
        _assert_close(row, expected)


def _assert_same_model(folder, expected, atol):
    assert sorted(file.name for file in folder.iterdir()) == sorted(file.name for file in expected.iterdir())
    assert (folder / "config.json").read_text() == (expected / "config.json").read_text()
    weights, expected_weights = (safetensors.torch.load_file(each / "model.safetensors") for each in (folder, expected))
    assert weights.keys() == expected_weights.keys()
    for name, value in weights.items():
        assert value.dtype == expected_weights[name].dtype
        torch.testing.assert_close(value, expected_weights[name], rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("name", "expected"), [("ddp", "one"), ("fsdp2", "one"), ("qwen", "one qwen")], ids=["ddp", "fsdp2", "no slot"]
)
def test_the_saved_model_is_complete_and_matches_one_process(root, two, name, expected):
    assert two[0][name]["error"] is None, two[0][name]
    _assert_same_model(root / name / "model", root / expected / "model", 1e-3)  # AdamW's first steps amplify rounding
    assert not list((root / name).rglob("*.tmp"))


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_stopped_run_resumes_bit_for_bit_on_the_same_number_of_ranks(root, two, wrapper):
    for rank in (0, 1):
        cut, resumed = two[rank][f"{wrapper} cut"], two[rank][f"{wrapper} cut resumed"]
        assert cut["error"].startswith("KeyboardInterrupt")
        assert resumed["error"] is None, resumed
        assert _without_times(resumed["result"]) == _without_times(two[rank][wrapper]["result"])
    assert resumed["done"] is None
    assert two[0][f"{wrapper} cut resumed"]["done"] == 3
    assert two[0][f"{wrapper} cut resumed"]["said"][0].startswith("In 8 steps"), "something else was reported first"
    for log in ("steps", "loads", "evaluations"):
        assert _rows(root / f"{wrapper} cut", log) == _rows(root / wrapper, log)
    _assert_same_model(root / f"{wrapper} cut" / "model", root / wrapper / "model", 0)


def _assert_resumed(root, attempt, name, whole, changed):
    assert attempt["error"] is None, attempt
    assert attempt["done"] == 3
    assert attempt["said"][0].startswith(f"{changed} changed since")
    assert [row["step"] for row in _rows(root / name)] == list(range(1, 9))
    for row, expected in zip(_rows(root / name)[:4], _rows(root / whole)[:4], strict=True):
        _assert_close(row, expected, AT_FORWARD)
    assert attempt["result"]["val_nats"] == pytest.approx(Run(root / whole).result["val_nats"], rel=1e-3)


def test_a_run_can_be_resumed_with_other_ranks_and_another_wrapper(root, two):
    _assert_resumed(root, two[0]["fsdp2 to ddp"], "fsdp2 cut, on other ranks", "fsdp2", "wrapper")
    _assert_resumed(root, two[0]["one to fsdp2"], "one cut", "one", "wrapper and number of ranks")
    options = {"evaluate_every": 3, "save_model": True, "resume": True}
    alone = _alone(root, "ddp cut, on other ranks", **options)
    _assert_resumed(root, alone, "ddp cut, on other ranks", "ddp", "wrapper and number of ranks")


def test_a_run_on_four_ranks_resumes_bit_for_bit(root):
    for attempts in run_on_ranks(4, lab_ranks.four, root):
        assert not isinstance(attempts, str), attempts
        assert attempts["resumed"]["error"] is None
        assert _without_times(attempts["resumed"]["result"]) == _without_times(attempts["whole"]["result"])
    assert _rows(root / "four cut") == _rows(root / "four")
    alone = _alone(root, "four alone", width=64, layers=2, expert_width=32, steps=1)
    _assert_close(_rows(root / "four")[0], _rows(root / "four alone")[0] | {"learning_rate": 3e-3}, AT_FORWARD)
    assert _rows(root / "four", "loads")[0] == _rows(root / "four alone", "loads")[0]
    assert alone["result"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "options",
            "EquipoiseError: every rank must be started with the same options: learning_rate is 0.001 on rank 0",
        ),
        ("micro-batches", "UsageError: --micro-batches must be a multiple of the number of ranks, .*got 3 on 2 ranks"),
        (
            "balance batch",
            "UsageError: --balance-batch must divide the number of micro-batches per rank: got 4 and 2 on each of 2",
        ),
        ("no wrapper", "UsageError: --wrapper none needs one process: got 2 ranks"),
        ("not new", "EquipoiseError: --out must be new or empty: .*ddp holds"),
        ("other text", "EquipoiseError: every rank must have the same text: rank 0 has the fingerprint"),
        ("model of one", "UsageError: on rank 1: --model must be a folder with a config.json: model has none"),
        ("full disk", "EquipoiseError: A checkpoint must be written completely: .*step-00000006"),
    ],
)
def test_invalid_options_give_the_same_error_on_every_rank(root, two, name, message):
    assert re.match(message, two[0][name]["error"]), two[0][name]["error"]
    assert two[1][name]["error"] == two[0][name]["error"]
    assert two[0][name]["shared"]
    assert two[1][name]["shared"]
    if name not in ("not new", "full disk"):
        assert not (root / name).exists(), "it was refused after something was written"
    assert not (root / "not new 1").exists()


def test_a_run_can_be_resumed_after_a_full_disk(root, two):
    assert two[0]["room again"]["error"] is None, two[0]["room again"]
    assert two[1]["room again"]["result"]["val_nats"] == two[1]["ddp"]["result"]["val_nats"]
    assert not list((root / "full disk").rglob("*.tmp"))


def test_the_previous_checkpoint_replaces_a_damaged_newest_one_on_every_rank(root, two):
    assert any("step-00000006 cannot be read" in line for line in two[0]["damaged"]["said"])
    assert two[0]["damaged"]["done"] == 3
    for rank in (0, 1):
        assert two[rank]["damaged"]["result"]["val_nats"] == two[rank]["ddp"]["result"]["val_nats"]


def test_a_comparison_on_two_ranks_writes_results_and_report(root, two):
    comparison = two[0]["compare"]
    assert comparison == two[1]["compare"]
    assert comparison["failure"] is None
    assert [result["strategy"] for result in comparison["results"]] == ["none", STRATEGY]
    assert json.loads((root / "compare" / "results.json").read_text()) == comparison["results"]
    assert (root / "compare" / "report.html").exists()
    assert (root / "compare" / "compare.json").exists()


def test_a_wrapper_is_refused_with_one_process(root):
    attempt = lab_ranks.attempt(tiny(root, "alone", wrapper="ddp"), ONE_PROCESS)
    assert attempt["error"].startswith("UsageError: --wrapper ddp needs several ranks: got one process. Start them")
    assert not (root / "alone").exists()


def test_only_rank_0_has_trackers(root):
    """Accelerate, whose trackers these are, must neither join the ranks again nor set their threads."""
    first, second = run_on_ranks(2, lab_ranks.tracked, root)
    assert first["error"] is None, first
    assert first["steps"] == [*range(1, 9), "finished"] and second["steps"] == []
    assert first["threads"] == second["threads"] == 0
    plain = run_on_ranks(2, lab_ranks.one_run, root, "untracked", {})
    assert _without_times(plain[0]["result"]) == _without_times(first["result"])
    assert not [text for text in first["said"] if "failed" in text]
