from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from spar.models.attention import attention_bias, position_ids_from_mask
from spar.models.dualtoken.model import DualEmbedder
from spar.models.dualtoken.sampling import CodeSampling
from spar.models.dualtoken.tokenizer import DualCodes

IMAGE = 5  # the id of an image's placeholder


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def sampled(model, tokens, mask, sampling=CodeSampling(), seeds=None) -> DualCodes:  # noqa: B008 (frozen)
    """All positions' codes, `[B, N, D]`."""
    steps = list(model.generate_codes(tokens, mask, sampling, seeds or generators(len(tokens))))
    return DualCodes(*(torch.stack([getattr(s, name) for s in steps], dim=1) for name in ("pixel", "semantic")))


PROMPTS = torch.tensor([[0, 0, 7, 8, 9], [6, 11, 12, 13, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def test_a_visual_token_is_the_two_vocabularies_side_by_side(dual_config, dual_model, randomize):
    embedder = randomize(DualEmbedder(dual_config))
    pixel, semantic = torch.randn(16, 8), torch.randn(16, 4)

    def mlp(network, x):
        return F.linear(F.gelu(F.linear(x, network[0].weight, network[0].bias)), network[2].weight, network[2].bias)

    token = embedder({"pixel": pixel, "semantic": semantic})
    both = torch.cat([mlp(embedder.pixel, pixel), mlp(embedder.semantic, semantic)], dim=1)
    torch.testing.assert_close(token, both + embedder.positions)
    assert token.shape == (16, 16)
    one = embedder({"pixel": pixel[3], "semantic": semantic[3]}, 3)
    torch.testing.assert_close(one, token[3])
    plain = randomize(DualEmbedder(replace(dual_config, visual_positions=False)))
    token = plain({"pixel": pixel, "semantic": semantic})
    torch.testing.assert_close(token, torch.cat([mlp(plain.pixel, pixel), mlp(plain.semantic, semantic)], dim=1))


def test_visual_tokens_take_the_placeholders_places_in_raster_order(dual_model):
    codes = dual_model.tokenizer.encode(images(2))
    tokens = torch.full((2, 20), 7)
    tokens[0, 1:17], tokens[1, 3:19] = IMAGE, IMAGE
    embeddings = dual_model.embed(tokens, codes)
    own = dual_model.embed_codes(codes)
    for row, start in ((0, 1), (1, 3)):
        torch.testing.assert_close(embeddings[row, start : start + 16], own[row])
    entries = dual_model.tokenizer.pixel_quantizer.decode(codes.pixel)[1, 2, 3]
    other = dual_model.tokenizer.semantic_quantizer.decode(codes.semantic)[1, 2, 3]
    torch.testing.assert_close(own[1, 2 * 4 + 3], dual_model.embedder({"pixel": entries, "semantic": other}, 2 * 4 + 3))


def test_placeholders_without_an_image_are_refused(dual_model):
    with pytest.raises(ValueError, match="expected one visual token for each of 1 image placeholders, got 0"):
        dual_model.embed(torch.tensor([[7, IMAGE]]), None)


def test_teacher_forcing_gives_the_logits_of_sequential_sampling(dual_model):
    """The likeliest codes one by one, then the same codes at once: at every position and depth the same logits."""
    greedy = CodeSampling(temperature=0)
    with torch.no_grad():
        codes = sampled(dual_model, PROMPTS, MASK, greedy)
        grid = DualCodes(codes.pixel.unflatten(1, (4, 4)), codes.semantic.unflatten(1, (4, 4)))
        embeddings = torch.cat([dual_model.embed(PROMPTS, None), dual_model.embed_codes(grid)], dim=1)
        mask = torch.cat([MASK, MASK.new_ones(2, 16)], dim=1)
        states, _ = dual_model.language(
            embeddings, attention_bias(mask, embeddings, causal=True), position_ids_from_mask(mask)
        )
        before = states[:, 4:-1].flatten(0, 1)                                 # the state before each position
        logits = dual_model.code_logits(before, DualCodes(codes.pixel.flatten(0, 1), codes.semantic.flatten(0, 1)))
    assert torch.equal(logits["pixel"].argmax(-1), codes.pixel.flatten(0, 1))
    assert torch.equal(logits["semantic"].argmax(-1), codes.semantic.flatten(0, 1))


def test_depth_heads_are_causal_over_depths(dual_model):
    """Each depth's logits are those of the earlier codes alone, exactly as sampling computes them."""
    states = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    codes = torch.randint(0, 8, (6, 3), generator=torch.Generator().manual_seed(1))
    quantizer, head = dual_model.tokenizer.pixel_quantizer, dual_model.pixel_head
    whole = head(states, quantizer.partial_sums(codes)[:, :-1])
    assert whole.shape == (6, 3, 8)
    for depth in range(3):
        sums = quantizer.partial_sums(codes[:, :depth]) if depth else torch.zeros(6, 0, 8)
        torch.testing.assert_close(head(states, sums)[:, depth], whole[:, depth])
    changed = codes.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 8
    other = head(states, quantizer.partial_sums(changed)[:, :-1])
    torch.testing.assert_close(other[:, :2], whole[:, :2])
    assert not torch.allclose(other[:, 2], whole[:, 2])


def test_semantic_codes_are_given_the_pixel_codes_or_not(dual_config, dual_model, randomize):
    """Another pixel code at any depth changes the logits of the semantic codes, from the first on; with independent
    heads it does not.
    """
    states = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    pixel = torch.randint(0, 8, (6, 3), generator=torch.Generator().manual_seed(1))
    semantic = torch.randint(0, 12, (6, 2), generator=torch.Generator().manual_seed(2))
    other = pixel.clone()
    other[:, 2] = (other[:, 2] + 1) % 8
    apart = randomize(type(dual_model)(replace(dual_config, semantic_given_pixel=False)))
    for model, given in ((dual_model, True), (apart, False)):
        one, two = (model.code_logits(states, DualCodes(codes, semantic))["semantic"] for codes in (pixel, other))
        assert ((one - two).abs().amax((1, 2)) > 1e-4).all() if given else torch.equal(one, two)
    assert "from_given.weight" in dict(dual_model.semantic_head.named_parameters())
    assert "from_given.weight" not in dict(dual_model.pixel_head.named_parameters())


def test_a_batch_gives_the_images_that_each_prompt_gives_alone(dual_model):
    with torch.no_grad():
        both = sampled(dual_model, PROMPTS, MASK, seeds=generators(2))
        first = sampled(dual_model, PROMPTS[:1, 2:], MASK[:1, 2:], seeds=generators(1))
        second = sampled(dual_model, PROMPTS[1:], MASK[1:], seeds=generators(1, first=1))
    for name in ("pixel", "semantic"):
        assert torch.equal(getattr(both, name)[0], getattr(first, name)[0])
        assert torch.equal(getattr(both, name)[1], getattr(second, name)[0])


def test_the_cache_changes_nothing(dual_model):
    """Each position again, with the whole sequence computed anew."""
    with torch.no_grad():
        codes = sampled(dual_model, PROMPTS[1:], MASK[1:], CodeSampling(temperature=0))
        embeddings = dual_model.embed(PROMPTS[1:], None)
        for place in range(16):
            mask = MASK.new_ones(1, embeddings.shape[1])
            bias = attention_bias(mask, embeddings, causal=True)
            states, _ = dual_model.language(embeddings, bias, position_ids_from_mask(mask))
            own = dual_model._sample_position(states[:, -1], CodeSampling(temperature=0), generators(1))
            assert torch.equal(own.pixel, codes.pixel[:, place]) and torch.equal(own.semantic, codes.semantic[:, place])
            quantizers = dual_model.tokenizer.quantizers
            vectors = {name: one.decode(getattr(own, name)) for name, one in quantizers.items()}
            token = dual_model.embedder(vectors, place)
            embeddings = torch.cat([embeddings, token[:, None]], dim=1)


def test_deeper_codes_have_their_own_temperature(dual_model):
    """With decay 0 the first code of a position is drawn as before, and the deeper ones are the likeliest after it."""
    sampling = CodeSampling(temperature=2.0, depth_decay=0.0)
    assert [sampling.at_depth(d).temperature for d in range(3)] == [2.0, 0.0, 0.0]
    assert [replace(sampling, depth_decay=0.5).at_depth(d).temperature for d in range(3)] == [2.0, 1.0, 0.5]
    states = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    drawn, plain = (
        dual_model._sample_position(states, one, generators(6)) for one in (sampling, CodeSampling(temperature=2.0))
    )
    assert torch.equal(drawn.pixel[:, 0], plain.pixel[:, 0]) and not torch.equal(drawn.pixel, plain.pixel)
    logits = dual_model.code_logits(states, drawn)
    for name in ("pixel", "semantic"):
        assert torch.equal(logits[name][:, 1:].argmax(-1), getattr(drawn, name)[:, 1:])


def test_guidance_one_is_the_conditional_branch_and_more_is_not(dual_model):
    unconditional = torch.tensor([[0, 0, 0, 14, 9]] * 2)
    tokens = torch.cat([PROMPTS, unconditional])
    mask = torch.cat([MASK, (unconditional > 0).long()])
    with torch.no_grad():
        alone = sampled(dual_model, PROMPTS, MASK)
        one = sampled(dual_model, tokens, mask, CodeSampling(guidance=1.0), generators(2))
        three = sampled(dual_model, tokens, mask, CodeSampling(guidance=3.0), generators(2))
    assert torch.equal(one.pixel, alone.pixel) and torch.equal(one.semantic, alone.semantic)
    assert not torch.equal(three.pixel, alone.pixel)


def test_answers_depend_on_both_vocabularies_and_on_places(dual_model):
    """What the LLM reads of an image is its codes: another code in either vocabulary, or at another place, changes the
    states that an answer is read from.
    """
    codes = dual_model.tokenizer.encode(images(1))
    tokens = torch.tensor([[7, *[IMAGE] * 16, 8, 9]])
    mask = torch.ones_like(tokens)

    def states(codes):
        embeddings = dual_model.embed(tokens, codes)
        return dual_model.language(embeddings, attention_bias(mask, embeddings, causal=True), torch.arange(19)[None])[0]

    plain = states(codes)[:, -1]
    other_pixel = DualCodes((codes.pixel + 1) % 8, codes.semantic)
    other_semantic = DualCodes(codes.pixel, (codes.semantic + 1) % 12)
    turned = DualCodes(codes.pixel.flip(1), codes.semantic.flip(1))
    for other in (other_pixel, other_semantic, turned):
        assert (states(other)[:, -1] - plain).abs().max() > 1e-3
    rows = dual_model.understand(tokens, mask, codes, max_new_tokens=3)
    assert len(rows) == 1 and len(rows[0]) <= 3
