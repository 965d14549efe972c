"""Which files hold the weights, and what is said to be missing, before anything is built."""

import json

import pytest
import torch
from safetensors.torch import save_file

from equipoise import EquipoiseError, UsageError
from equipoise_lab.models.weights import find_weights

ADAPTER = "it holds an adapter (adapter_config.json)"
NOTHING = "there is no model.safetensors, no pytorch_model.bin and no index of either"


def _write(folder, *names):
    for name in names:
        if name.endswith(".safetensors"):
            save_file({f"{name}.weight": torch.zeros(2, dtype=torch.bfloat16)}, folder / name)
        else:
            (folder / name).write_bytes(b"\x80\x04 pickle")


def _index(folder, *shards, name="model.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": {f"{shard}.weight": shard for shard in shards}}))


@pytest.mark.parametrize(
    ("names", "shards", "expected"),
    [
        (["model.safetensors"], [], ["model.safetensors"]),
        (["pytorch_model.bin"], [], ["pytorch_model.bin"]),
        (["model.safetensors", "pytorch_model.bin"], [], ["model.safetensors"]),
        (["model.safetensors"], ["model-1.safetensors"], ["model.safetensors"]),
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["model.safetensors", "equipoise_biases.safetensors"], [], ["model.safetensors"]),
    ],
)
def test_the_files_are_those_that_transformers_reads(tmp_path, names, shards, expected):
    _write(tmp_path, *names)
    if shards:
        _index(tmp_path, *shards)
    weights = find_weights(tmp_path)
    assert weights.files == [tmp_path / name for name in expected] and weights.reason == ""
    assert weights.dtypes == {f"{name}.weight": "BF16" for name in expected if name.endswith(".safetensors")}
    weights.require(tmp_path)


def test_shards_in_the_format_of_pytorch_are_known_by_name(tmp_path):
    shards = ["pytorch_model-1.bin", "pytorch_model-2.bin"]
    _write(tmp_path, *shards)
    _index(tmp_path, *shards, name="pytorch_model.bin.index.json")
    weights = find_weights(tmp_path)
    assert [file.name for file in weights.files] == shards
    assert weights.dtypes == {f"{name}.weight": "" for name in shards}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], NOTHING),
        (["optimizer.pt", "training_args.bin", "rng_state_0.pth", "equipoise_biases.safetensors"], NOTHING),
        (["model.gguf"], f"{NOTHING}, only model.gguf, which Transformers does not read here"),
        (["c.pth", "consolidated.safetensors"], f"{NOTHING}, only c.pth and 1 more, which Transformers does not read"),
        (["adapter_config.json", "adapter_model.safetensors"], ADAPTER),
        (["adapter_config.json", "model.safetensors"], ADAPTER),
    ],
)
def test_a_folder_without_weights_of_a_model_says_what_it_has(tmp_path, names, reason):
    _write(tmp_path, *names)
    weights = find_weights(tmp_path)
    assert weights.files == [] and weights.dtypes == {} and weights.reason.startswith(reason)
    with pytest.raises(UsageError, match="MODEL must have weights") as error:
        weights.require(tmp_path)
    assert f"{tmp_path} has none: {reason}" in str(error.value)


def _lfs_pointer(folder):
    (folder / "b.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


def _empty(folder):
    (folder / "b.safetensors").write_bytes(b"")


def _torn(folder):
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def _dangling_link(folder):
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").symlink_to(folder / "blob")


def _one_more_shard(folder):
    _index(folder, "a.safetensors", "b.safetensors", "c.safetensors", "d.safetensors")


def _no_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    for name in "ab":
        (folder / f"{name}.safetensors").rename(folder / f"model-{name}.safetensors")


def _index_without_files(folder):
    _index(folder)


def _torn_index(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')


def _index_of_numbers(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": 2}}')


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_lfs_pointer, "b.safetensors is a pointer of Git LFS without the file itself, which `git lfs pull` fetches"),
        (_empty, "b.safetensors is empty"),
        (_torn, "b.safetensors is damaged (SafetensorError: "),
        (_dangling_link, "model.safetensors.index.json lists 2 files, and b.safetensors is missing"),
        (_one_more_shard, "model.safetensors.index.json lists 4 files, and c.safetensors and 1 more are missing"),
        (_no_index, "model.safetensors.index.json is missing beside model-a.safetensors and 1 more"),
        (_index_without_files, "model.safetensors.index.json lists 0 files, and none is named"),
        (_torn_index, "model.safetensors.index.json is damaged (JSONDecodeError: "),
        (_index_of_numbers, "model.safetensors.index.json is damaged (TypeError: "),
    ],
)
def test_what_is_missing_of_shards_is_named(tmp_path, damage, reason):
    _write(tmp_path, "a.safetensors", "b.safetensors")
    _index(tmp_path, "a.safetensors", "b.safetensors")
    damage(tmp_path)
    weights = find_weights(tmp_path)
    assert weights.files == [] and weights.reason.startswith(reason)
    with pytest.raises(EquipoiseError, match="MODEL must have all of its weights") as error:
        weights.require(tmp_path)
    assert f"{tmp_path}: {reason}" in str(error.value)
