"""Models that come with an installation are named where a folder is expected."""

from pathlib import Path

import pytest
import torch

from spar.checkpoints import bundled
from spar.checkpoints.bundled import BUNDLED_MODELS, local_folder
from spar.checkpoints.hub import model_folder, model_name
from spar.common.errors import InputError
from spar.inference.loading import load_pipeline


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_a_name_is_the_folder_of_its_model(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert model_folder(name) == BUNDLED_MODELS[name]
    pipe = load_pipeline(name, device="cpu", dtype=torch.float32)
    assert pipe.bundle.manifest and pipe.origin["model"] == model_name(name, BUNDLED_MODELS[name]) == name


def test_a_folder_of_the_same_name_comes_first(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dualtoken").mkdir()                                           # results, say: no model
    assert model_folder("dualtoken") == local_folder(Path("dualtoken")) == BUNDLED_MODELS["dualtoken"]
    (tmp_path / "dualtoken" / "config.json").write_text("{}")
    assert model_folder("dualtoken").resolve() == tmp_path / "dualtoken" and local_folder(Path("x")) == Path("x")
    assert model_name("dualtoken", model_folder("dualtoken")) == "dualtoken"
    with pytest.raises(InputError, match="config.json"):
        load_pipeline("dualtoken")


def test_an_installation_without_a_model_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(bundled.BUNDLED_MODELS, "dualtoken", tmp_path / "none")
    with pytest.raises(InputError, match="this installation has no bundled model 'dualtoken'; give a model folder"):
        load_pipeline("dualtoken")
