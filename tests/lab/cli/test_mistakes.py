"""Wrong command lines: one sentence each, with the name that was meant, before anything heavy is imported."""

import re
import subprocess
import sys

import pytest

from equipoise_lab.cli.parser import parse

TRAIN = ["train", "--out", "run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "the command must be one that `equipoise --help` lists: got 'trian'. Did you mean train.$"),
        (["bananas"], "got 'bananas'. `equipoise --help` says what each does.$"),
        ([], "the command must be one of compare, .*: got none. `equipoise --help` says what each does.$"),
        (["--out", "x"], "must come first: got --out. Write it before that.$"),
        (["--verison"], "got '--verison'. Did you mean --version.$"),
        (["-V"], "got -V. Did you mean `equipoise --version`.$"),
        (["help", "train"], "got help. Did you mean `equipoise train --help`.$"),
        (["train", "runs/one"], "`equipoise train` needs --out PATH: got runs/one alone. Write --out runs/one.$"),
        (["train", "-o", "new"], "which have two dashes: got -o. `equipoise train --help` says what it takes.$"),
        (["train", "-s", "new"], "got -s. `equipoise train --help` says what it takes.$"),
        (
            ["report", "--out", "run"],
            "an option must be one of `equipoise report`: got --out. `equipoise report",
        ),
        (["export-check"], "needs MODEL: got none. Folder of a Transformers model, or of a run. `equipoise export-c"),
        ([*TRAIN, "--data", ""], "--data must have a value: got an empty one. Write one, or leave it out.$"),
        (
            ["compare", "--out", "run", "--seeds", str(10**9)],
            "--seeds must be at most 1,000: got 1,000,000,000. Low",
        ),
        (
            [*TRAIN, "--steps", str(10**20)],
            "--steps must be at most 1,000,000,000: got 100,000,000,000,000,000,000. Lower it.$",
        ),
        ([*TRAIN, "--data", "b\udcff"], "an argument must be UTF-8: got 'b\ufffd'. Rename the file or folder.$"),
        (["report", ""], "an argument must have a value: got an empty one."),
        ([*TRAIN, "--seed", str(2**63)], r"--seed must be below 2\*\*63: got 9223372036854775808.$"),
        (["conformance", "os:path"], "a driver must be a class .*: path in os is none. Write module:Class.$"),
        (["conformance", "os:nothing"], "nothing in os does not exist. Write module:Class.$"),
        (["reproduce", "--budget", "0", "--page", "."], "--page must be a file: . is a folder. Write claims.md.$"),
        ([*TRAIN, "--stpes", "3"], "an option must be one of `equipoise train`: got --stpes. Did you mean --steps.$"),
        ([*TRAIN, "--stpes=3"], "got --stpes. Did you mean --steps.$"),
        ([*TRAIN, "--save-model"], "got --save-model. Did you mean --no-save-model.$"),
        ([*TRAIN, "--no-shuffled"], "got --no-shuffled. Did you mean --shuffled.$"),
        ([*TRAIN, "--json"], "got --json. `equipoise train --help` says what it takes.$"),
        ([*TRAIN, "-x"], "which have two dashes: got -x. `equipoise train --help` says what it takes.$"),
        ([*TRAIN, "--steps", "3", "4"], "`equipoise train` must get the arguments that it knows, .*: got 4. Leave"),
        (
            [*TRAIN, "--arch", "qwen3moe"],
            "--arch must be one of .*: got 'qwen3moe'. Did you mean qwen3_moe.$",
        ),
        ([*TRAIN, "--steps", "many"], "--steps must be a whole number: got 'many'.$"),
        ([*TRAIN, "--switch-at", "y"], "--switch-at must be a whole number: got 'y'.$"),
        ([*TRAIN, "--warmup", "x"], "--warmup must be a number: got 'x'.$"),
        (["train", "--steps", "--out", "run"], "--steps needs a value: got none. Write one after it"),
        (["train"], "`equipoise train` needs --out PATH: got none. Output folder. `equipoise train --help` says"),
        (["report"], "`equipoise report` needs PATH: got none. The folder that was passed as --out"),
        (["recipes", "olmoe", "switch"], "`equipoise recipes` must get .*: got switch. Leave that out"),
        (["recipes", "olmo"], "one of the 15 that `equipoise recipes` lists: got 'olmo'. Did you mean olmoe.$"),
        (["reproduce", "1-scop"], "CLAIM must be all or one of .*: got '1-scop'. Did you mean 1-scope.$"),
        (["reproduce", "--dtype", "float16"], "--dtype must be one of .*: got 'float16'. Did you mean bfloat16 or"),
        (["reproduce", "--budget", "x"], "--budget must be a number: got 'x'.$"),
        (["conformance", "transfomers"], "got 'transfomers'. Did you mean transformers.$"),
        ([*TRAIN, "--strategy", "los-free"], "got 'los-free'. Did you mean loss-free.$"),
        ([*TRAIN, "--strategy", "loss-free,rate=1e-2"], "must follow a colon: .* Did you mean loss-free:rate=1e-2.$"),
        ([*TRAIN, "--strategy", "lbl scope=sequence"], "must follow a colon: .* Did you mean lbl:scope=sequence.$"),
        (
            ["compare", "--out", "run", "--strategies", "none,lbl"],
            "got 'none,lbl'. Write none lbl.$",
        ),
        (["compare", "--out", "run", "--strategies", "lbl", "none", "none"], "got none and none, which are the same."),
        (
            [*TRAIN, "--strategy", "lbl:scope=global"],
            "in 'lbl:scope=global', scope must be one of .* mean global_batch",
        ),
        (
            [*TRAIN, "--strategy", "lbl:scop=sequence"],
            "An option of lbl must be .*: got .*. Did you mean scope.$",
        ),
        ([*TRAIN, "--strategy", "loss-free:rule=sing"], "got 'sing'. Did you mean sign"),
        ([*TRAIN, "--then", "quantle", "--switch-at", "3"], "got 'quantle'. Did you mean quantile.$"),
        (["compare", "--out", "run", "--strategies", "none", "lbl:scope=global"], "Did you mean global_batch"),
        ([*TRAIN, "--selection", "sinkhorm"], "--selection must be one of .*got 'sinkhorm'. Did you mean sinkhorn"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(tmp_path, monkeypatch, error_of, arguments, message):
    monkeypatch.chdir(tmp_path)
    line = error_of(arguments, 2)
    assert re.search(message, line), line
    for word in ("helptext", "Unrecognized", "Perhaps", "invalid literal", "NoneType"):
        assert word not in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["trian"], "{'torch', 'transformers', 'pyarrow', 'tyro'}"),
        (["train", "--out", "run", "--strategy", "lbl:scope=global"], "{'torch', 'transformers', 'pyarrow'}"),
        (["compare", "--out", "run", "--strategies", "lbll"], "{'torch', 'transformers', 'pyarrow'}"),
        (["compare", "--out", "run", "--strategies", "loss-free:rate=-1"], "{'transformers', 'plotly', 'jinja2'}"),
    ],
)
def test_strategies_are_checked_before_heavy_imports(tmp_path, arguments, heavy):
    code = (
        f"import sys\nfrom equipoise_lab.cli import main\ntry: main({arguments!r})\n"
        f"except SystemExit as stop: assert stop.code == 2\nimported = {heavy} & set(sys.modules)\n"
        "assert not imported, imported"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tracker", "tensorboard", "trackio", "--strategies", "none", "loss-free"],
        ["--tracker", "tensorboard", "--strategies", "none", "--strategies", "loss-free", "--tracker", "trackio"],
        ["--tracker=tensorboard", "--strategies=none", "--tracker=trackio", "--strategies=loss-free"],
    ],
)
def test_an_option_of_several_values_may_be_written_several_times(arguments):
    """Tyro takes the last one, silently."""
    options = parse(["compare", "--steps", "9", *arguments, "--out", "x"])
    assert options.tracker == ("tensorboard", "trackio") and options.strategies == ("none", "loss-free")
    assert options.steps == 9 and str(options.out) == "x"


def test_a_missing_tracker_is_one_sentence_and_leaves_no_folder(tmp_path, monkeypatch, error_of):
    monkeypatch.setattr("equipoise_lab.train.tracker_kinds.find_spec", lambda name: None)
    for command in ("train", "compare"):
        message = error_of([command, "--out", tmp_path / "run", "--tracker", "mlflow", "--data", tmp_path], 1)
        assert message.endswith("it is not installed. Install it with: pip install mlflow")
        assert not (tmp_path / "run").exists()
