from dataclasses import replace

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from spar.models.encoder import internvl_config
from spar.models.spar import SparModel

IMAGE = 5  # the placeholder's id
START, STOP = 3, 4
UNUSED = 6  # an end of turn that these weights never write
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def model(config, randomize) -> SparModel:
    return randomize(SparModel(config))


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(*lengths: int, image: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Left-padded ids and mask: random words, after an image's placeholders if requested."""
    generator = torch.Generator().manual_seed(0)
    front = [START, *[IMAGE] * 16, STOP] if image else []
    texts = [front + torch.randint(7, 128, (length,), generator=generator).tolist() for length in lengths]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    return ids, mask


@pytest.mark.parametrize("image", [False, True], ids=["prompt", "edit"])
def test_a_condition_and_its_velocity_do_not_depend_on_the_batch(model, image):
    ids, mask = rows(4, 9, 6, image=image)
    f_v = draw(3, 16, 32) if image else None
    latent, time = draw(3, 8, 4, 4), torch.tensor([0.2, 0.5, 0.9])
    together = model.condition(ids, mask, f_v)
    velocity = model.velocity(latent, time, together).velocity
    for row, length in enumerate(mask.sum(1).tolist()):
        one = slice(row, row + 1)
        alone = model.condition(ids[one, -length:], mask[one, -length:], f_v[one] if image else None)
        own = slice(together.states.shape[1] - alone.states.shape[1], None)
        torch.testing.assert_close(together.states[row, own], alone.states[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.weights[row, own], alone.weights[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(velocity[one], model.velocity(latent[one], time[one], alone).velocity,
                                   rtol=1e-4, atol=1e-5)


def test_the_queries_end_the_sequence_and_see_the_prompt_which_sees_none_of_them(config, randomize, model):
    ids, mask = rows(5, 5)
    queries = config.connector.queries
    other = randomize(SparModel(config))
    other.connector.queries.add_(1.0)
    before, after = model.condition(ids, mask), other.condition(ids, mask)
    assert before.mask.tolist() == [[1] * (5 + queries)] * 2
    torch.testing.assert_close(before.weights[:, :5], after.weights[:, :5])            # the LLM is causal
    assert ((before.weights[:, 5:] - after.weights[:, 5:]).abs().amax(-1) > 1e-6).all()
    ids[:, 0] = 70  # the first word
    reworded = model.condition(ids, mask)
    assert ((before.weights[:, 5:] - reworded.weights[:, 5:]).abs().amax(-1) > 1e-6).all()


def test_the_router_reads_the_configured_layers_on_a_common_scale(config, model):
    """The routing weights, from the library's own hidden states."""
    ids, mask = rows(6, 6)
    embeddings = torch.cat([model.language.embed(ids), model.connector.queries.expand(2, -1, -1)], dim=1)
    hidden = model.language.network(inputs_embeds=embeddings, output_hidden_states=True).hidden_states
    assert model.layers == (1, 2, 3, 4)
    states = torch.stack([hidden[layer] for layer in model.layers])
    states = states / states.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(model.condition(ids, mask).weights, model.router(states).weights, rtol=1e-4, atol=1e-5)


def test_the_loss_reaches_every_query_through_the_frozen_llm(config, randomize):
    model = randomize(SparModel(config))
    model.connector.queries.requires_grad_()
    condition = model.condition(*rows(4, 6))
    velocity = model.velocity(draw(2, 8, 4, 4), torch.tensor([0.3, 0.6]), condition).velocity
    (gradient,) = torch.autograd.grad(velocity.square().mean(), [model.connector.queries])
    assert (gradient.abs().amax(-1) > 0).all()


def test_images_take_the_place_of_their_placeholders_in_order(model):
    ids, _ = rows(2, 3, image=True)
    f_v = draw(2, 16, 32)
    embedded, words = model.embed(ids, f_v), model.language.embed(ids)
    assert torch.equal(embedded[ids == IMAGE].view(2, 16, 32), f_v)
    assert torch.equal(embedded[ids != IMAGE], words[ids != IMAGE])


@pytest.mark.parametrize("images", [0, 1, 3])
def test_placeholders_and_images_must_agree(model, images):
    ids, mask = rows(2, 3, image=True)
    with pytest.raises(ValueError, match="expected one visual token for each of 32 image placeholders"):
        model.condition(ids, mask, draw(images, 16, 32) if images else None)
    with pytest.raises(ValueError, match="of 0 image placeholders"):
        model.condition(*rows(2), draw(1, 16, 32))


def test_a_reference_changes_the_condition_of_its_own_row_only(model):
    ids, mask = rows(4, 4, image=True)
    f_v = draw(2, 16, 32)
    other = f_v.clone()
    other[1, 7] = draw(32, seed=3)
    before, after = model.condition(ids, mask, f_v).states, model.condition(ids, mask, other).states
    torch.testing.assert_close(before[0], after[0])
    assert ((before[1] - after[1]).abs().amax(-1) > 1e-6).all()  # bidirectional: even the first token sees it


def test_a_references_own_features_reach_the_denoiser_past_the_llm(config, randomize):
    model = randomize(SparModel(config))
    model.router.projection.weight.zero_()  # what the LLM saw is lost here
    ids, mask = rows(4, image=True)
    velocity = [
        model.velocity(draw(1, 8, 4, 4), torch.tensor([0.5]), model.condition(ids, mask, draw(1, 16, 32, seed=seed)))
        for seed in range(2)
    ]
    assert (velocity[0].velocity - velocity[1].velocity).abs().max() > 1e-3


def test_the_denoiser_gets_the_references_latent_in_its_own_row(config, randomize):
    model = randomize(SparModel(config))
    model.tokenizer.latent_scale.fill_(0.5)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = model.tokenizer.encode(pixels)
    with_image, _ = rows(4, 4, image=True)
    words, mask = with_image.clone(), torch.ones_like(with_image)
    words[words == IMAGE] = 40
    ids, mask = torch.cat([words[:1], with_image]), torch.cat([mask[:1], mask])  # the first row has no image
    condition = model.condition(ids, mask, latents.f_v)
    torch.testing.assert_close(condition.reference[1:], 0.5 * latents.z_f)
    assert condition.reference[0].abs().max() == 0
    assert model.condition(words, mask[:2]).reference is None
    other = replace(config, denoiser=replace(config.denoiser, reference_latent=False))
    assert SparModel(other).condition(ids, mask, latents.f_v).reference is None


@pytest.mark.parametrize("latent", [True, False])
def test_the_denoiser_gets_the_states_at_the_first_references_tokens_cell_by_cell(config, randomize, latent):
    reads = replace(config.denoiser, reference_states=True, reference_latent=latent)
    model = randomize(SparModel(replace(config, denoiser=reads)))
    image = [START, *[IMAGE] * 16, STOP]
    ids = torch.tensor([[40, *[41] * len(image), *image], [*image, 41, *image], [41] * (2 * len(image) + 1)])
    f_v = draw(3, 16, 32)
    condition = model.condition(ids, torch.ones_like(ids), f_v)
    states = condition.reference[:, 8 * latent :]                       # after the latent's channels
    for row, start in ((0, 20), (1, 1)):
        wanted = condition.states[row, start : start + 16].T.unflatten(1, (4, 4))
        torch.testing.assert_close(states[row], wanted)
    assert states.shape[1] == config.denoiser.caption_channels and condition.reference[2].abs().max() == 0
    without = replace(condition, reference=torch.cat([condition.reference[:, : 8 * latent], 0 * states], dim=1))
    noisy, time = draw(3, 8, 4, 4), torch.full((3,), 0.5)
    change = (model.velocity(noisy, time, condition).velocity - model.velocity(noisy, time, without).velocity).abs()
    assert change[:2].amax() > 1e-3 and change[2].max() == 0


def test_several_references_of_a_row_give_the_first_ones_latent(model):
    front = [START, *[IMAGE] * 16, STOP]
    ids = torch.tensor([[*front, *front, 40], [*front, *[41] * len(front), 40]])
    f_v = draw(3, 16, 32)
    wanted = model.tokenizer.normalize(model.tokenizer.fuse(f_v[[0, 2]]).z_f)
    torch.testing.assert_close(model.condition(ids, torch.ones_like(ids), f_v).reference, wanted)


def test_decoding_undoes_the_latent_scale_and_keeps_to_the_range_of_pixels(config, randomize):
    model = randomize(SparModel(config))
    model.tokenizer.latent_scale.fill_(0.25)
    latent = draw(2, 8, 4, 4)
    raw = model.tokenizer.decode(latent / 0.25)
    assert raw.min() < 0 and raw.max() > 1
    torch.testing.assert_close(model.decode(latent), raw.clamp(0, 1))


def test_answers_equal_those_of_the_whole_library_model(config, model):
    """Image and question to words, against InternVLForConditionalGeneration.generate with the same weights."""
    endless = replace(config.text, eos_token_id=UNUSED)
    reference = InternVLForConditionalGeneration(internvl_config(config.vision, endless)).eval()
    reference.model.vision_tower.load_state_dict(model.tokenizer.encoder.vision_tower.state_dict())
    reference.model.multi_modal_projector.load_state_dict(model.tokenizer.encoder.multi_modal_projector.state_dict())
    reference.model.language_model.load_state_dict(model.language.network.state_dict())
    reference.tie_weights()
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids, mask = rows(2, 7, 4, image=True)
    whole = reference.generate(
        input_ids=ids, attention_mask=mask, pixel_values=(pixels - MEAN) / STD, do_sample=False, max_new_tokens=6
    )[:, ids.shape[1] :].tolist()
    eos = config.text.eos_token_id
    assert len({tuple(row) for row in whole}) > 1 and min(map(len, whole)) == 6 and UNUSED not in sum(whole, [])
    answers = model.understand(ids, mask, model.tokenizer.encoder(pixels), max_new_tokens=6)
    assert answers == [row[: row.index(eos)] if eos in row else row for row in whole]
