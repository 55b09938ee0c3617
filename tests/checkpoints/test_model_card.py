"""The model card agrees with the folder's files; its example runs in the folder."""

import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from spar.checkpoints.bundled import BUNDLED_MODELS
from spar.checkpoints.dualtoken_format import build_dualtoken_card, load_dualtoken
from spar.checkpoints.model_card import USE, model_card, recorded_scores
from spar.checkpoints.spar_format import CARD, build_model_card, load_model, save_model
from spar.inference.pipeline import BUNDLED
from spar.processing.prompts import known_words


@pytest.fixture(scope="module")
def loaded(tiny_run):
    return load_model(tiny_run.path / "model")


def card(loaded, **manifest) -> str:
    return build_model_card(replace(loaded, manifest=manifest))


def test_the_card_of_a_saved_model_tells_what_made_it(loaded, tmp_path):
    save_model(loaded, tmp_path / "model")
    text = (tmp_path / "model" / CARD).read_text(encoding="utf-8")
    found = ModelCard(text)
    assert (found.data.library_name, found.data.license, found.data.pipeline_tag) == ("spar", "unknown", "any-to-any")
    assert "text-to-image" in found.data.tags and found.data.base_model is None
    manifest = loaded.manifest
    for key in ("recipe", "seed", "commit"):
        assert f"| {key} | {manifest[key]} |" in text
    assert f"unified-3 ({manifest['stages']['unified-3']['steps']} steps)" in text
    count = sum(t.numel() for t in loaded.model.state_dict().values())
    assert f"| all | {count:,} |" in text and "Made for images of 64 x 64 pixels" in text
    assert "None are recorded." in text and "license is not recorded" in text and "closed vocabulary of" in text


def test_what_is_not_recorded_is_not_claimed(loaded):
    text = card(loaded)
    assert "`manifest.json` does not record it." in text and "None are recorded." in text and "# SPAR\n" in text
    assert "untrained" not in text and not re.search(r"\| (recipe|seed|commit|stages|versions) \|", text)


def test_licence_scores_and_parents_come_from_the_manifest(loaded):
    sources = {
        "mllm": {"source": "OpenGVLab/InternVL3-1B-hf", "commit": "abc"}, "dit": {"source": "my-folder", "sha256": {}}
    }  # fmt: skip
    text = card(
        loaded, license="apache-2.0", scores={"shapes-gen": {"overall": 0.9287, "note": "good"}}, sources=sources,
        parts={"router": "random weights of seed 0"},
    )  # fmt: skip
    found = ModelCard(text).data
    assert found.license == "apache-2.0" and found.base_model == ["OpenGVLab/InternVL3-1B-hf"]
    assert "| shapes-gen | overall | 0.9287 |" in text and "good" not in text and "license is not recorded" not in text
    assert "| router | random weights of seed 0 |" in text and "untrained random weights" in text


def test_a_manifest_of_somebody_else_breaks_neither_head_nor_tables(loaded):
    evil = "x | y\n---\nlicense: mit\n<script>[a](b)"
    text = card(
        loaded, recipe=evil, license="mit\ntags: [evil]", parts={evil: evil}, stages=3, versions=[1], machine=None,
        sources="x", scores={evil: {evil: 1}, "a": 2}, origin=4, seed={"a": 1},
    )  # fmt: skip
    found = ModelCard(text)
    assert found.data.license == "mit\ntags: [evil]" and "evil" not in found.data.tags
    assert "<script>" not in text.replace("\\<script>", "") and "[a](b)" not in text.replace("\\[a](b)", "")
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (3, 4), line


def test_an_open_vocabulary_is_not_called_closed(loaded):
    model = loaded.model.config
    assert "closed vocabulary" not in model_card(model, {}, {"router": 1}, prompt=300, words=None)
    assert "at most 300 tokens" in model_card(model, {}, {"router": 1}, prompt=300, words=None)


def test_scores_are_numbers_whatever_a_manifest_holds():
    assert recorded_scores({"scores": {"a": {"x": 1, "y": True, "z": "1"}, "b": []}}) == {"a": {"x": 1}}
    assert [recorded_scores({"scores": value}) for value in (None, [], "x", 1)] == [{}] * 4


def test_the_bundled_cards_are_up_to_date():
    """If not: python docs/bundle.py NAME --scores"""
    assert (BUNDLED / CARD).read_text(encoding="utf-8") == build_model_card(load_model(BUNDLED))
    other = BUNDLED_MODELS["dualtoken"]
    assert (other / CARD).read_text(encoding="utf-8") == build_dualtoken_card(load_dualtoken(other))


def test_the_bundled_card_counts_the_words_that_a_user_may_write():
    """As README.md: no marks, no names of roles."""
    words = known_words(load_model(BUNDLED).text_tokenizer)
    assert not {"user", ",", "<|im_end|>"} & {*words}
    assert f"closed vocabulary of {len(words)} words" in (BUNDLED / CARD).read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_cards_example_runs_in_its_folder(monkeypatch):
    text = (BUNDLED / CARD).read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
    assert example == USE
    monkeypatch.chdir(BUNDLED)
    names: dict = {}
    exec(compile(example, "card", "exec"), names)  # the repository's own text
    assert names["again"].size == (64, 64) and isinstance(names["answer"], str) and names["answer"]
