"""What decides a run: norms of the attention, micro-batches that are forwarded together."""

import json

import pytest

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.records import Run, write_json
from equipoise_lab.train.loop import train
from equipoise_lab.train.models import build_model


def _rows(folder, log="steps"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows(log)]


# ---- --qk-norm ----


def test_qk_norm_puts_norms_on_queries_and_keys_and_nothing_else(tiny):
    plain, normed = (dict(build_model(tiny(qk_norm=on), 300).named_parameters()) for on in (False, True))
    added = normed.keys() - plain.keys()
    assert added == {"model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"}
    assert plain.keys() <= normed.keys()
    assert all(value.equal(normed[name]) for name, value in plain.items()), "other weights at the start"


def test_qk_norm_trains_and_is_kept(tiny, silent):
    train(tiny(qk_norm=True, steps=1), silent())
    assert Run(tiny().out).config["options"]["qk_norm"] is True
    assert json.loads((tiny().out / "model" / "config.json").read_text())["use_qk_norm"] is True
    with pytest.raises(EquipoiseError, match="has qk_norm=True, got False"):
        train(tiny(steps=1, resume=True), silent())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen3_moe"}, "must go with --arch glm4_moe: got qwen3_moe, which always has these norms"),
        ({"arch": "olmoe"}, "got olmoe, which always has these norms"),
        ({"arch": "mixtral"}, "got mixtral, which has no such norms"),
        ({"arch": "deepseek_v3"}, "got deepseek_v3, which has no such norms"),
    ],
)
def test_qk_norm_is_refused_where_there_is_no_such_switch(tiny, silent, options, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(qk_norm=True, **options), silent())
    assert not tiny().out.exists()


def test_qk_norm_is_refused_for_a_model_of_its_own(tiny, silent, tmp_path):
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UsageError, match="got --model, whose own config says it"):
        train(tiny(qk_norm=True, model=tmp_path), silent())


@pytest.mark.parametrize("arch", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_what_is_said_of_the_other_architectures_is_true(tiny, arch):
    names = [name for name, _ in build_model(tiny(arch=arch), 300).named_parameters()]
    has = any(".q_norm." in name for name in names) and any(".k_norm." in name for name in names)
    assert has == (arch in ("qwen3_moe", "olmoe"))


# ---- --balance-batch ----


def _trained(tiny, silent, out, **options):
    config = tiny(micro_batches=6, steps=4, save_model=False, out=out, **options)
    result = train(config, silent())
    return result, _rows(out), [row["load"] for row in _rows(out, "loads")]


@pytest.mark.parametrize("together", [2, 3, 6])
def test_the_global_batch_does_not_see_what_is_forwarded_together(tiny, silent, tmp_path, together):
    strategy = "loss-free:rate=1e-2+lbl:scope=global_batch,coefficient=1"
    _, alone, load = _trained(tiny, silent, tmp_path / "1", strategy=strategy)
    result, rows, joined = _trained(tiny, silent, tmp_path / "b", strategy=strategy, balance_batch=together)
    assert joined == load
    for ours, theirs in zip(rows, alone, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)  # float32, summed in another order
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        assert ours["maxvio_batch"] == theirs["maxvio_batch"]
    assert result["tokens"] == 4 * 6 * 2 * 16


def test_all_micro_batches_together_make_scope_micro_batch_the_global_batch(tiny, silent, tmp_path):
    found = {
        scope: _trained(tiny, silent, tmp_path / scope, strategy=f"lbl:scope={scope},coefficient=1", balance_batch=6)
        for scope in ("micro_batch", "global_batch")
    }
    assert found["micro_batch"][1:] == found["global_batch"][1:]
    _, apart, _ = _trained(tiny, silent, tmp_path / "1", strategy="lbl:scope=micro_batch,coefficient=1")
    assert apart[-1]["loss"] != found["micro_batch"][1][-1]["loss"]
    assert found["micro_batch"][1][0]["maxvio_micro"] == pytest.approx(found["micro_batch"][1][0]["maxvio_batch"])


def test_scope_micro_batch_counts_over_what_is_forwarded_together(tiny, silent, tmp_path):
    """The more tokens are counted together, the more even their counts are by chance alone."""
    found = [
        _trained(tiny, silent, tmp_path / str(b), strategy="lbl:scope=micro_batch,coefficient=1e-9", balance_batch=b)[
            1
        ][0]["maxvio_micro"]
        for b in (1, 2, 3, 6)
    ]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


def test_a_balance_batch_must_divide_and_is_kept(tiny, silent):
    for wrong, message in (
        (0, "--balance-batch must be at least 1: got 0"),
        (2, "must divide --micro-batches: got 2 of 3"),
    ):
        with pytest.raises(UsageError, match=message):
            train(tiny(balance_batch=wrong), silent())
    assert not tiny().out.exists()
    train(tiny(balance_batch=3, steps=1), silent())
    with pytest.raises(EquipoiseError, match="has balance_batch=3, got 1"):
        train(tiny(steps=1, resume=True), silent())


def test_a_run_from_before_an_option_was_there_goes_on(tiny, silent):
    config = tiny(steps=8)
    with pytest.raises(KeyboardInterrupt):
        train(config, silent(6))
    facts = Run(config.out).config
    for name in ("qk_norm", "balance_batch"):
        del facts["options"][name]
    write_json(config.out / "config.json", facts)
    with pytest.raises(EquipoiseError, match="has balance_batch=1, got 3"):
        train(tiny(steps=8, balance_batch=3, resume=True), silent())
    assert train(tiny(steps=8, resume=True), silent())["steps"] == 8
