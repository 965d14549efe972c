"""The options --qk-norm and --balance-batch."""

import json

import pytest

from equipoise.errors import EquipoiseError, UsageError
from equipoise_lab.records import Run, write_json
from equipoise_lab.train.loop import train
from equipoise_lab.train.models import build_model


def _rows(folder, log="steps"):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in Run(folder).rows(log)]


# ---- --qk-norm ----


def test_qk_norm_adds_norms_to_queries_and_keys_only(tiny):
    plain, normed = (dict(build_model(tiny(qk_norm=on), 300).named_parameters()) for on in (False, True))
    added = normed.keys() - plain.keys()
    assert added == {"model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.k_norm.weight"}
    assert plain.keys() <= normed.keys()
    assert all(value.equal(normed[name]) for name, value in plain.items()), "the initial weights differ"


def test_qk_norm_trains_and_must_stay_the_same(tiny, new_watcher):
    train(tiny(qk_norm=True, steps=1), new_watcher())
    assert Run(tiny().out).config["options"]["qk_norm"] is True
    assert json.loads((tiny().out / "model" / "config.json").read_text())["use_qk_norm"] is True
    with pytest.raises(EquipoiseError, match="has qk_norm=True, got False"):
        train(tiny(steps=1, resume=True), new_watcher())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arch": "qwen3_moe"}, "needs --arch glm4_moe: got qwen3_moe, which always has these norms"),
        ({"arch": "olmoe"}, "got olmoe, which always has these norms"),
        ({"arch": "mixtral"}, "got mixtral, which has no such norms"),
        ({"arch": "deepseek_v3"}, "got deepseek_v3, which has no such norms"),
    ],
)
def test_qk_norm_is_refused_for_other_architectures(tiny, new_watcher, options, message):
    with pytest.raises(UsageError, match=message):
        train(tiny(qk_norm=True, **options), new_watcher())
    assert not tiny().out.exists()


def test_qk_norm_is_refused_with_a_model_folder(tiny, new_watcher, tmp_path):
    write_json(tmp_path / "config.json", {})
    with pytest.raises(UsageError, match="got --model, and its config decides on these norms"):
        train(tiny(qk_norm=True, model=tmp_path), new_watcher())


@pytest.mark.parametrize("arch", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_qk_norm_errors_describe_the_other_architectures_correctly(tiny, arch):
    names = [name for name, _ in build_model(tiny(arch=arch), 300).named_parameters()]
    has = any(".q_norm." in name for name in names) and any(".k_norm." in name for name in names)
    assert has == (arch in ("qwen3_moe", "olmoe"))


# ---- --balance-batch ----


def _trained(tiny, new_watcher, out, **options):
    config = tiny(micro_batches=6, steps=4, save_model=False, out=out, **options)
    result = train(config, new_watcher())
    return result, _rows(out), [row["load"] for row in _rows(out, "loads")]


@pytest.mark.parametrize("together", [2, 3, 6])
def test_global_batch_scope_does_not_depend_on_balance_batch(tiny, new_watcher, tmp_path, together):
    strategy = "loss-free:rate=1e-2+lbl:scope=global_batch,coefficient=1"
    _, alone, load = _trained(tiny, new_watcher, tmp_path / "1", strategy=strategy)
    result, rows, joined = _trained(tiny, new_watcher, tmp_path / "b", strategy=strategy, balance_batch=together)
    assert joined == load
    for row, expected in zip(rows, alone, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)  # float32, summed in another order
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert row["maxvio_batch"] == expected["maxvio_batch"]
    assert result["tokens"] == 4 * 6 * 2 * 16


def test_with_all_micro_batches_joined_scope_micro_batch_equals_global_batch(tiny, new_watcher, tmp_path):
    by_scope = {
        scope: _trained(
            tiny, new_watcher, tmp_path / scope, strategy=f"lbl:scope={scope},coefficient=1", balance_batch=6
        )
        for scope in ("micro_batch", "global_batch")
    }
    assert by_scope["micro_batch"][1:] == by_scope["global_batch"][1:]
    _, apart, _ = _trained(tiny, new_watcher, tmp_path / "1", strategy="lbl:scope=micro_batch,coefficient=1")
    assert apart[-1]["loss"] != by_scope["micro_batch"][1][-1]["loss"]
    assert by_scope["micro_batch"][1][0]["maxvio_micro"] == pytest.approx(by_scope["micro_batch"][1][0]["maxvio_batch"])


def test_scope_micro_batch_counts_over_joined_micro_batches(tiny, new_watcher, tmp_path):
    """Counts over more tokens are more even by chance alone."""
    maxvios = [
        _trained(
            tiny, new_watcher, tmp_path / str(b), strategy="lbl:scope=micro_batch,coefficient=1e-9", balance_batch=b
        )[1][0]["maxvio_micro"]
        for b in (1, 2, 3, 6)
    ]
    assert maxvios == sorted(maxvios, reverse=True)
    assert len(set(maxvios)) == 4


def test_balance_batch_must_divide_and_must_stay_the_same(tiny, new_watcher):
    for value, message in (
        (0, "--balance-batch must be at least 1: got 0"),
        (2, "must divide --micro-batches: got 2 and 3"),
    ):
        with pytest.raises(UsageError, match=message):
            train(tiny(balance_batch=value), new_watcher())
    assert not tiny().out.exists()
    train(tiny(balance_batch=3, steps=1), new_watcher())
    with pytest.raises(EquipoiseError, match="has balance_batch=3, got 1"):
        train(tiny(steps=1, resume=True), new_watcher())


def test_a_run_older_than_an_option_can_be_resumed(tiny, new_watcher):
    config = tiny(steps=8)
    with pytest.raises(KeyboardInterrupt):
        train(config, new_watcher(6))
    facts = Run(config.out).config
    for name in ("qk_norm", "balance_batch"):
        del facts["options"][name]
    write_json(config.out / "config.json", facts)
    with pytest.raises(EquipoiseError, match="has balance_batch=1, got 3"):
        train(tiny(steps=8, balance_batch=3, resume=True), new_watcher())
    assert train(tiny(steps=8, resume=True), new_watcher())["steps"] == 8
