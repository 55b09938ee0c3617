"""Dense tagging: whitened features that say what they said, and words that begin where the encoder points."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spar.models.attention import attention_bias, position_ids_from_mask
from spar.recipes.shapes.dense_tagging import (
    TAG_NAMES,
    TAGS,
    TaggedEdits,
    TaggedLayouts,
    TagWordsObjective,
    init_tag_embeddings,
    tag_terms,
    whiten,
)
from spar.training.objectives.next_token import NextTokenObjective, image_features
from spar.training.plan import InitFolder, Origin, PlannedStage, StageStart
from spar.worlds.shapes.tokenizer import PLURALS


def test_whitening_changes_the_basis_and_nothing_that_is_read_off_it(start):
    begun = start("encoder")
    encoder, head = begun.modules.model.tokenizer.encoder, begun.modules.dense_head
    linears = [*head.tags.values(), head.center, head.coverage, head.pixels]
    with torch.no_grad():
        head.center.bias.normal_(generator=torch.Generator().manual_seed(0))
        f_v = encoder(begun.data.pixels(np.arange(len(begun.data.scenes))))
        read = [linear(f_v) for linear in linears]
        rows = f_v.flatten(0, 1).double()
        variances = torch.linalg.eigvalsh(torch.cov(rows.T))
        whiten(begun.modules, f_v, floor=0.1)
        white = encoder(begun.data.pixels(np.arange(len(begun.data.scenes))))
        assert not torch.allclose(white, f_v, atol=0.1)
        for before, linear in zip(read, linears, strict=True):
            assert torch.allclose(linear(white), before, atol=1e-3)
    after = torch.linalg.eigvalsh(torch.cov(white.flatten(0, 1).double().T))
    assert torch.allclose(after, variances / (variances + 0.1 * variances.mean()), atol=1e-3)
    assert torch.allclose(white.mean((0, 1)), torch.zeros(32), atol=1e-3)


def test_the_end_of_the_tagging_whitens_the_features_of_the_first_images(start):
    begun = start("encoder")
    encoder = begun.modules.model.tokenizer.encoder
    begun.stage.objective.finish(begun.ctx, begun.data)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        f_v = encoder(begun.data.pixels(np.arange(len(begun.data.scenes)))).float()
    assert torch.allclose(f_v.mean((0, 1)), torch.zeros(32), atol=0.05)
    variances = torch.linalg.eigvalsh(torch.cov(f_v.flatten(0, 1).double().T))
    assert float(variances.max()) == pytest.approx(1, abs=0.1)


def word(begun, text: str) -> torch.Tensor:
    (token,) = begun.ctx.prompts.encode(text)
    return begun.modules.model.language.network.embed_tokens.weight.detach()[token]


def test_each_tags_word_and_its_plural_point_where_the_tag_is_read_at_the_size_of_a_word(start):
    begun = start("encoder")
    table = begun.modules.model.language.network.embed_tokens.weight.detach().clone()
    size = float(table.norm(dim=-1).mean())
    init_tag_embeddings(begun.modules, begun.ctx.prompts)
    changed = set()
    for tag, names in TAG_NAMES.items():
        rows = begun.modules.dense_head.tags[tag].weight.detach()[TAGS[tag] - len(names) :]
        for name, row in zip(names, rows - rows.mean(0), strict=True):
            for text in {name, PLURALS.get(name, name)}:
                assert float(torch.cosine_similarity(word(begun, text), row, dim=0)) == pytest.approx(1, abs=1e-5)
                assert float(word(begun, text).norm()) == pytest.approx(size, rel=1e-5)
                changed.add(begun.ctx.prompts.encode(text)[0])
    after = begun.modules.model.language.network.embed_tokens.weight.detach()
    assert {i for i in range(len(table)) if not torch.equal(table[i], after[i])} == changed


def test_words_begin_at_the_tags_where_the_stage_says_so_and_starts_from_training(start, tiny_run):
    recipe, stage = tiny_run.recipe, tiny_run.recipe.stage("mllm")
    folder = InitFolder(tiny_run.path / "model", True)
    assert stage.objective.preparations(recipe, stage, Origin(before=recipe.stage("encoder"))) == ("tag embeddings",)
    assert stage.objective.preparations(recipe, stage, Origin()) == ("tag embeddings",)
    assert stage.objective.preparations(recipe, stage, Origin(init=folder)) == ()  # a finished model has its words
    assert NextTokenObjective().preparations(recipe, stage, Origin()) == ()
    plain, begun = start("mllm", objective=NextTokenObjective()), start("mllm")
    assert not torch.equal(word(plain, "red"), word(begun, "red")) and torch.equal(word(plain, "a"), word(begun, "a"))
    again = PlannedStage(stage, StageStart("state"), ())  # a saved state has them already
    TagWordsObjective().prepare(replace(plain.ctx, stage=stage), plain.data, again)
    assert not torch.equal(word(plain, "red"), word(begun, "red"))


def test_the_tags_of_a_layout_are_read_off_its_canvas(start):
    begun = start("mllm-2", prompt_share=1.0, edit_prompts=0.0)
    batch, objective = begun.batch(0), TagWordsObjective(edit_tags=0.5)
    assert isinstance(batch, TaggedLayouts)
    packed, states = objective.read(begun.ctx, batch)
    image, model = begun.recipe.model.text.image_token_id, begun.modules.model
    tokens = begun.ctx.prompts.layout(batch.texts)
    bias, positions = attention_bias(tokens.mask, states, causal=True), position_ids_from_mask(tokens.mask)
    alone = model.language(model.embed(tokens.ids, model.canvas(4)), bias, positions)[0]
    torch.testing.assert_close(states[packed.ids == image], alone[tokens.ids == image], rtol=1e-4, atol=1e-4)
    seen = alone[tokens.ids == image].unflatten(0, batch.counted.shape)
    wanted, found = tag_terms(begun.modules.dense_head, seen, batch.tags, batch.counted), objective(begun.ctx, batch)
    assert all(found[tag].item() == pytest.approx(wanted[tag].item(), rel=1e-3) for tag in TAGS)


def test_the_tags_after_an_edit_with_its_layout_are_read_off_the_image_of_that_prompt(start):
    begun = start("mllm", prompt_share=1.0, edit_prompts=1.0)
    batch, objective = begun.batch(0), TagWordsObjective(edit_tags=0.5)
    assert isinstance(batch, TaggedLayouts) and batch.edits
    image, model, prompts = begun.recipe.model.text.image_token_id, begun.modules.model, begun.ctx.prompts
    packed, states = objective.read(begun.ctx, batch)
    f_v, alone = image_features(begun.ctx, batch), []
    for texts in (batch.prompts, [f"{a}\n{b}" for a, b in zip(batch.prompts, batch.texts, strict=True)]):
        tokens = prompts.edit(texts)
        bias, positions = attention_bias(tokens.mask, states, causal=True), position_ids_from_mask(tokens.mask)
        found = model.language(model.embed(tokens.ids, f_v), bias, positions)[0]
        alone.append(found[tokens.ids == image].unflatten(0, batch.counted.shape))
    torch.testing.assert_close(
        states[packed.ids == image].unflatten(0, (4, -1)), torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4
    )
    wanted = tag_terms(begun.modules.dense_head, alone[1], batch.tags, batch.counted)
    found = objective(begun.ctx, batch)
    assert all(found[tag].item() == pytest.approx(wanted[tag].item(), rel=1e-3) for tag in TAGS)


def test_the_tags_after_an_edit_are_read_off_the_last_states_of_the_images_tokens(start):
    begun = start("mllm", prompt_share=1.0, edit_prompts=1.0, edit_layouts=False)
    batch, objective = begun.batch(0), TagWordsObjective(edit_tags=0.5)
    assert isinstance(batch, TaggedEdits)
    plain, tagged = (one(begun.ctx, batch) for one in (TagWordsObjective(), objective))
    assert {*tagged} - {*plain} == {*TAGS}
    wanted = plain["loss"] + 0.5 * sum(tagged[tag] for tag in TAGS)
    assert tagged["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)
    packed, states = objective.read(begun.ctx, batch)
    image = begun.recipe.model.text.image_token_id
    seen = torch.stack([row[ids == image] for row, ids in zip(states, packed.ids, strict=True)])
    by_rows = tag_terms(begun.modules.dense_head, seen, batch.tags, batch.counted)
    assert all(by_rows[tag].item() == pytest.approx(tagged[tag].item(), rel=1e-4) for tag in TAGS)
    # States that say the tags, in place of the LLM's: the term is that of a sure and right read-out.
    head, counted = begun.modules.dense_head, batch.counted
    with torch.no_grad():
        for name, linear in head.tags.items():
            linear.weight.zero_()[:, : TAGS[name]].fill_diagonal_(30)
            states = torch.nn.functional.one_hot(batch.tags[name], linear.weight.shape[1]).float()
            terms = tag_terms(head, states, batch.tags, counted)
            assert float(terms[name]) < 1e-6
            wrong = tag_terms(head, states, {**batch.tags, name: (batch.tags[name] + 1) % TAGS[name]}, counted)
            assert float(wrong[name]) == pytest.approx(30, rel=0.1)
