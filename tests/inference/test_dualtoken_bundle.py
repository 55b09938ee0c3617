"""What the bundled model of DualToken needs to answer and to draw: both streams, and every token at its place."""

import pytest
import torch

from spar.evaluation.options import EvalOptions
from spar.evaluation.shapes_agreement import shapes_agreement
from spar.evaluation.shapes_gen import shapes_gen
from spar.evaluation.shapes_vqa import shapes_vqa
from spar.inference.loading import load_pipeline
from spar.models.dualtoken.tokenizer import DualCodes

pytestmark = pytest.mark.slow
ANSWERS, DRAWINGS = EvalOptions(limit=8), EvalOptions(limit=5, images_per_prompt=1)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    return load_pipeline("dualtoken", device="cpu")


@pytest.fixture(scope="module")
def whole(pipe):
    """The scores of the model as it is."""
    return scores(pipe)


def scores(pipe) -> tuple[float, float]:
    return (
        shapes_vqa(pipe, ANSWERS).score("overall").value, shapes_gen(pipe, DRAWINGS).score("overall").value
    )  # fmt: skip


@pytest.mark.parametrize("stream", ["pixel", "semantic"])
def test_without_either_stream_answers_and_drawings_are_worse(pipe, whole, stream, monkeypatch):
    network = pipe.model.embedder.get_submodule(stream)
    hook = network.register_forward_hook(lambda module, given, out: torch.zeros_like(out))
    try:
        found = scores(pipe)
    finally:
        hook.remove()
    assert found[0] < whole[0] and found[1] < whole[1]


def test_with_tokens_at_other_places_drawings_are_worse_and_answers_hardly(pipe, whole):
    """Drawn tokens with the position embeddings of other places spoil what follows. Codes of an image at other places
    of the grid hardly change an answer: the encoder's deep codes carry their places.
    """
    order = torch.randperm(pipe.model.config.grid**2, generator=torch.Generator().manual_seed(0))
    whole_image = pipe.model.embed_codes

    def shuffled(codes):
        moved = (one.flatten(1, 2)[:, order].unflatten(1, one.shape[1:3]) for one in (codes.pixel, codes.semantic))
        return whole_image(DualCodes(*moved))

    pipe.model.embed_codes = shuffled
    try:
        answers = shapes_vqa(pipe, ANSWERS).score("overall").value
    finally:
        del pipe.model.embed_codes
    embedder, places = pipe.model.embedder, iter(order.tolist() * 1000)
    hook = embedder.register_forward_pre_hook(lambda module, given: (given[0], next(places)))
    try:
        drawings = shapes_gen(pipe, DRAWINGS).score("overall").value
    finally:
        hook.remove()
    assert drawings < whole[1] and abs(answers - whole[0]) < 0.15


def test_what_it_says_of_its_own_drawings_agrees_with_most_prompts(pipe):
    found = shapes_agreement(pipe, EvalOptions(limit=5))
    assert found.score("overall").value > 0.5
