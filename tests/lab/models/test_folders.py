"""Where a saved model lies, and what is suggested if it is not there."""

from equipoise_lab.models.folders import model_folder, suggest_models


def test_the_model_of_a_run_is_inside_its_folder(tmp_path):
    assert model_folder(tmp_path) == tmp_path
    (tmp_path / "model").mkdir()
    assert model_folder(tmp_path) == tmp_path, "an empty folder holds no model"
    (tmp_path / "model" / "config.json").touch()
    assert model_folder(tmp_path) == tmp_path / "model"


def test_models_inside_a_folder_are_suggested(tmp_path):
    assert suggest_models(tmp_path) == ""
    for name in "abcdef":
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").touch()
    names = ", ".join(str(tmp_path / name) for name in "abcd")
    assert suggest_models(tmp_path) == f" It holds models or runs: give one of {names} and 2 more."
