"""The studies' variants of DualToken: what each changes in the network, on random weights."""

from dataclasses import replace

import pytest
import torch

from spar.common.errors import InputError
from spar.models.attention import attention_bias
from spar.models.dualtoken.config import QuantizerConfig
from spar.models.dualtoken.model import DualTokenModel
from spar.models.dualtoken.sampling import CodeSampling
from spar.models.dualtoken.tokenizer import DualCodes
from spar.recipes import recipe

IMAGE = 5  # the id of an image's placeholder


@pytest.fixture(scope="module")
def build(dual_config, randomize):
    """A model of the small configuration with changes, random weights and codebooks of random vectors."""

    def build(**changes):
        model = randomize(DualTokenModel(replace(dual_config, **changes)))
        generator = torch.Generator().manual_seed(1)
        for quantizer in model.tokenizer.quantizers.values():
            quantizer.codebook.copy_(torch.randn(quantizer.codebook.shape, generator=generator))
        return model

    return build


def one_codebook(config):
    return {
        "one_codebook": True, "shortcut": 0.0, "pixel": config.semantic, "reads": ("semantic",),
        "semantic_given_pixel": False,
    }  # fmt: skip


def pixels(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def last_state(model, codes):
    tokens = torch.tensor([[7, *[IMAGE] * 16, 8, 9]])
    embeddings = model.embed(tokens, codes)
    bias = attention_bias(torch.ones_like(tokens), embeddings, causal=True)
    return model.language(embeddings, bias, torch.arange(19)[None])[0][:, -1]


@pytest.mark.parametrize(("reads", "other"), [("pixel", "semantic"), ("semantic", "pixel")])
def test_the_llm_reads_the_named_vocabulary_alone_and_predicts_both(build, reads, other):
    model = build(reads=(reads,))
    codes = model.tokenizer.encode(pixels(1))
    plain = last_state(model, codes)
    entries = {"pixel": 8, "semantic": 12}

    def moved(name):
        return replace(codes, **{name: (getattr(codes, name) + 1) % entries[name]})

    assert torch.equal(last_state(model, moved(other)), plain)
    assert (last_state(model, moved(reads)) - plain).abs().max() > 1e-3
    logits = model.code_logits(torch.randn(5, 16), DualCodes(torch.zeros(5, 3).long(), torch.zeros(5, 2).long()))
    assert {name: found.shape for name, found in logits.items()} == {"pixel": (5, 3, 8), "semantic": (5, 2, 12)}


def test_one_codebook_serves_pixels_and_meaning(build, dual_config):
    model = build(**one_codebook(dual_config))
    tokenizer = model.tokenizer
    codes = tokenizer.encode(pixels(2))
    assert torch.equal(codes.pixel, codes.semantic) and codes.pixel.shape == (2, 4, 4, 2)
    out = tokenizer(pixels(2))
    assert set(out.quantized) == {"semantic"} and out.image_vectors is out.quantized["semantic"].vectors
    torch.testing.assert_close(tokenizer.decode(codes.pixel), tokenizer.decoder(out.image_vectors, 4))
    torch.testing.assert_close(tokenizer.pooled(codes.semantic), out.pooled)
    parts = tuple(name for name, _ in model.named_children())
    assert parts == model.config.parts == ("tokenizer", "language", "embedder", "semantic_head")
    prompts = torch.tensor([[9, 7, 6]])
    steps = [*model.generate_codes(prompts, torch.ones_like(prompts), CodeSampling(), [torch.Generator()])]
    assert len(steps) == 16 and all(torch.equal(step.pixel, step.semantic) for step in steps)


def test_both_vocabularies_of_one_layer_read_the_same_features(dual_config, build):
    """Deep: the pixel codes read what the semantic codes read. Shallow: the other way round, and the codes' features
    run through every layer after it.
    """
    x = pixels(1)
    for layer in (3, 5):
        model = build(vision=replace(dual_config.vision, pixel_layer=layer, semantic_layer=layer), shortcut=0.0)
        tokenizer = model.tokenizer
        features = tokenizer.features(x)
        torch.testing.assert_close(features.inputs["pixel"], tokenizer.reduce_pixel(features.deep))
        torch.testing.assert_close(features.inputs["semantic"], tokenizer.reduce_semantic(features.deep))
        (last,) = tokenizer.encoder.run(features.deep, range(layer + 1, 7), (6,))
        network = tokenizer.encoder.network
        wanted = network.head(network.post_layernorm(last))
        torch.testing.assert_close(tokenizer.encoder.pool(features.deep, layer), wanted)


def test_independent_heads_differ_from_the_base_in_that_alone():
    base, study = recipe("dualtoken-shapes"), recipe("dualtoken-independent-heads")
    assert base.model.semantic_given_pixel and study.model == replace(base.model, semantic_given_pixel=False)
    assert replace(study, name=base.name, model=base.model) == base
    published = recipe("dualtoken-3b").model
    assert not published.semantic_given_pixel and not published.visual_positions


def test_the_perceptual_distance_compares_the_same_layers_in_every_study():
    names = ("shapes", "one-codebook", "both-deep", "both-shallow", "pixel-only", "semantic-only")
    visions = [recipe(f"dualtoken-{name}").model.vision for name in names]
    assert {vision.shallow_layers for vision in visions} == {(1, 2)}
    assert [vision.taps for vision in visions[2:4]] == [(1, 7, 7), (1, 2, 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reads": ()}, "reads: expected some of pixel, semantic, in this order, got ()"),
        ({"reads": ("semantic", "pixel")}, "in this order, got ('semantic', 'pixel')"),
        ({"reads": ("words",)}, "got ('words',)"),
        ({"one_codebook": True}, "one_codebook: expected shortcut 0, pixel equal to semantic"),
        ({"one_codebook": True, "shortcut": 0.0, "pixel": QuantizerConfig(), "semantic": QuantizerConfig()},
         "semantic_given_pixel: expected False with one_codebook"),
    ],
)
def test_contradictory_settings_are_refused(dual_config, changes, message):
    with pytest.raises(InputError) as error:
        replace(dual_config, **changes)
    assert message in str(error.value)


def test_pixels_have_no_vocabulary_to_read_of_one_codebook(dual_config):
    with pytest.raises(InputError, match="reads: expected some of semantic, in this order"):
        replace(dual_config, **{**one_codebook(dual_config), "reads": ("pixel", "semantic")})
