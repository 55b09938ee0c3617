"""DualToken's stages: what each trains and leaves, on the finished run of `dualtoken-tiny`."""

import json
import math
import os
import shutil
import signal
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from spar.checkpoints.dualtoken_format import load_dualtoken, save_dualtoken
from spar.checkpoints.eight_bits import rounded
from spar.checkpoints.lora import LoraConfig
from spar.checkpoints.safetensors_io import read_tensors
from spar.common.errors import InputError
from spar.inference.dualtoken import DualTokenPipeline
from spar.processing.prompts import tower_tokens
from spar.recipes import recipe
from spar.recipes.shapes.curricula import UnifiedLessons
from spar.recipes.shapes.data import ShapesTrainingData
from spar.recipes.shapes.dense_tagging import DenseContrastiveObjective
from spar.training.checkpoint import load_group
from spar.training.config import freeze
from spar.training.data import CaptionData, DialogueData
from spar.training.files_data import FilesData
from spar.training.initial_weights import load_previous_weights, random_modules
from spar.training.loop import run_stage
from spar.training.objectives.base import StepContext
from spar.training.objectives.dual_next_token import DualNextTokenObjective, flat_patches
from spar.training.objectives.dual_tokenizer import ADAPTIVE_RANGE, DualTokenizerObjective, adaptive_weight
from spar.training.trainer import train
from spar.worlds.shapes.tokenizer import build_tokenizer

TINY = recipe("dualtoken-tiny")
TOKENIZER_STAGES = ("towers", "tokenizer", "tokenizer-gan")


def weights(run, stage):
    return load_group(run.path / stage / "done", "modules")


def changed(run, before, after):
    """What training moved; the rounding of the tokenizer before the LLM's first stage is not that."""
    one, other = weights(run, before), weights(run, after)

    def same(key):
        is_rounded = key.startswith("model.tokenizer.") and after not in TOKENIZER_STAGES
        return torch.equal(rounded(key, one[key], 8) if is_rounded else one[key], other[key])

    return {key for key in one if not same(key)}


def begin(run, name, **changes):
    """The context of a stage with the weights that `dual_run` had there, its data, and its first batch."""
    names = [stage.name for stage in TINY.stages]
    stage = replace(TINY.stage(name), **changes)
    modules = random_modules(TINY, "cpu", {})
    if names.index(name):
        load_previous_weights(modules, run.path / names[names.index(name) - 1] / "done")
    prompts = TINY.prompts(build_tokenizer())
    data = ShapesTrainingData(TINY.data, TINY.model.grid, TINY.seed, run.path / "cache")
    freeze(modules, stage)
    ctx = StepContext(modules.train(), prompts, TINY, stage, torch.device("cpu"))
    return ctx, data, data.get_batch(stage, 0, slice(None))


def test_every_stage_runs_and_leaves_a_model(dual_run):
    seen = {stage for stage, *_ in dual_run.reports}
    assert seen == {stage.name for stage in TINY.stages}
    assert all(math.isfinite(values["loss"]) for *_, values in dual_run.reports)
    loaded = load_dualtoken(dual_run.path / "model")
    own = {key.removeprefix("model."): value for key, value in weights(dual_run, "finetune").items()}
    assert all(torch.equal(own[key], value) for key, value in loaded.model.state_dict().items())
    assert set(loaded.manifest["stages"]) == seen


def test_each_stage_changes_its_own_parts_alone(dual_run):
    codebooks = {"model.tokenizer.pixel_quantizer", "model.tokenizer.semantic_quantizer"}
    for before, after in zip(TINY.stages, TINY.stages[1:], strict=False):
        patterns = [pattern.rstrip("*").rstrip(".") for pattern in after.trainable]
        for key in changed(dual_run, before.name, after.name):
            allowed = [*patterns, *(codebooks if "tokenizer" in after.name else ()), "teacher", "lecam"]
            assert any(key.startswith(pattern) for pattern in allowed), (after.name, key)


def test_the_teacher_is_the_encoder_before_the_tokenizer_and_stays(dual_run):
    before, after = weights(dual_run, "towers"), weights(dual_run, "tokenizer-gan")
    encoder = {key for key in before if key.startswith("model.tokenizer.encoder.")}
    for key in encoder:
        assert torch.equal(after[key.replace("model.tokenizer.encoder", "teacher")], before[key])
    assert any(not torch.equal(before[key], after[key]) for key in encoder)
    text = {key for key in before if "text_tower" in key}
    assert text and all(torch.equal(before[key], after[key]) for key in text)


def test_codebooks_move_with_each_step_of_the_tokenizer_and_rest_later(dual_run):
    moved = changed(dual_run, "tokenizer", "tokenizer-gan")
    assert {"model.tokenizer.pixel_quantizer.codebook", "model.tokenizer.semantic_quantizer.codebook"} <= moved
    assert not any("quantizer" in key for key in changed(dual_run, "tokenizer-gan", "finetune"))


def test_a_folder_in_bfloat16_gives_the_codes_that_the_llm_learnt(dual_run, tmp_path):
    """Rounded after the tokenizer's last stage: the codes of training are those of a folder of half the size, or with
    the matrices in 8 bits of a quarter.
    """
    bundle = load_dualtoken(dual_run.path / "model")
    save_dualtoken(bundle, tmp_path / "half", torch.bfloat16)
    half = load_dualtoken(tmp_path / "half").model
    assert not torch.equal(half.language.network.norm.weight, bundle.model.language.network.norm.weight)
    for name, value in bundle.model.tokenizer.state_dict().items():
        assert torch.equal(half.tokenizer.state_dict()[name], value), name
        assert torch.equal(rounded(name, value, 8), value), name
    images = torch.rand(4, 3, TINY.image_size, TINY.image_size, generator=torch.Generator().manual_seed(0))
    for name, codes in vars(bundle.model.tokenizer.encode(images)).items():
        assert torch.equal(vars(half.tokenizer.encode(images))[name], codes)


def test_a_run_that_stopped_inside_the_tokenizer_goes_on_as_if_it_had_not(dual_run, tmp_path):
    """Codebooks, their averages and restarts come back from the state: 1 + 2 steps equal 3."""
    own = replace(TINY, stages=TINY.stages[:2])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(own, whole, stages=("tokenizer",), init_from=dual_run.path / "towers" / "done")
    count = []

    def report(stage, step, steps, values):
        count.append(step)
        if len(count) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    assert train(own, parts, stages=("tokenizer",), init_from=dual_run.path / "towers" / "done", report=report) is None
    assert train(own, parts, stages=("tokenizer",), resume=True) is not None
    one, other = (load_group(run / "tokenizer" / "done", "modules") for run in (whole, parts))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_codes_are_kept_as_whole_numbers(dual_run):
    ctx, _, batch = begin(dual_run, "unified")
    codes = ctx.stage.objective.codes(ctx, batch)
    again = ctx.stage.objective.codes(ctx, batch)
    fresh = ctx.modules.model.tokenizer.encode(batch.pixels)
    for name in ("pixel", "semantic"):
        assert getattr(codes, name).dtype == torch.int64
        assert torch.equal(getattr(codes, name), getattr(again, name))
        assert torch.equal(getattr(codes, name), getattr(fresh, name))


def test_image_terms_are_the_cross_entropies_of_the_codes_after_the_prompt(dual_run):
    data = UnifiedLessons(("count",), caption_share=1.0)
    objective = replace(TINY.stage("unified").objective, unconditional=0.0, depth_decay=0.5, flat=1.0)
    ctx, _, batch = begin(dual_run, "unified", data=data, objective=objective)
    terms = objective(ctx, batch)
    model, codes = ctx.modules.model, objective.codes(ctx, batch)
    expected = {f"{name}_{depth}": [] for name in ("pixel", "semantic") for depth in (1, 2)}
    for row, text in enumerate(batch.texts):                                   # each image alone, position by position
        tokens = ctx.prompts.generation([text])
        x = model.embed(tokens.ids, None)
        visual = model.embed_codes(type(codes)(codes.pixel[row : row + 1], codes.semantic[row : row + 1]))
        x = torch.cat([x, visual], dim=1)
        length = x.shape[1]
        bias = torch.full((length, length), -6e4).triu(1)[None, None]
        states = model.language(x, bias, torch.arange(length)[None])[0][0]
        for place in range(64):
            state = states[tokens.ids.shape[1] - 1 + place][None]
            given = model.tokenizer.pixel_quantizer.decode(codes.pixel[row].flatten(0, 1)[place][None])
            for name in ("pixel", "semantic"):
                own = getattr(codes, name)[row].flatten(0, 1)[place][None]
                sums = model.tokenizer.quantizers[name].partial_sums(own)[:, :-1]
                head = model.get_submodule(f"{name}_head")
                logits = (head(state, sums, given) if name == "semantic" else head(state, sums))[0]
                for depth in (1, 2):
                    loss = F.cross_entropy(logits[depth - 1], own[0, depth - 1])
                    expected[f"{name}_{depth}"].append(float(loss.detach()))
    means = {name: sum(values) / len(values) for name, values in expected.items()}
    for name, value in means.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-3)
    total = sum((means[f"{name}_1"] + 0.5 * means[f"{name}_2"]) / 1.5 for name in ("pixel", "semantic"))
    assert float(terms["loss"]) == pytest.approx(total, rel=1e-3)


def test_codes_after_the_first_of_patches_of_one_colour_weigh_less(dual_run):
    """With weight 0 the loss is that of all first codes and of the deeper codes where a patch shows more."""
    pixels = torch.full((1, 3, 16, 16), 0.5)
    pixels[0, 1, 3, 12] = 0.53                                                 # in the second of four patches
    pixels[0, :, 8:, :8] = torch.linspace(0.3, 0.315, 8)                       # too little to see
    assert flat_patches(pixels, 8).tolist() == [[True, False, True, True]]
    data = UnifiedLessons(("count",), caption_share=1.0)
    objective = replace(TINY.stage("unified").objective, unconditional=0.0, flat=1.0, depth_decay=1.0)
    ctx, _, batch = begin(dual_run, "unified", data=data, objective=objective)
    plain = objective(ctx, batch)
    weighed = {flat: replace(objective, flat=flat)(ctx, batch) for flat in (0.0, 0.5)}
    flat = flat_patches(batch.pixels, 8)
    assert 0.3 < flat.float().mean() < 0.98
    first = sum(plain[f"{name}_1"] for name in ("pixel", "semantic")) / 2
    assert first < weighed[0.0]["loss"] < weighed[0.5]["loss"] < plain["loss"]
    torch.testing.assert_close(weighed[0.5]["loss"], (weighed[0.0]["loss"] + plain["loss"]) / 2)
    blank = replace(batch, pixels=torch.full_like(batch.pixels, 0.5), keys=np.full_like(batch.keys, -1))
    terms = replace(objective, flat=0.0)(ctx, blank)
    assert float(terms["loss"]) == pytest.approx(float(terms["pixel_1"] + terms["semantic_1"]) / 2, rel=1e-4)


def test_questions_are_answered_from_codes(dual_run):
    data = UnifiedLessons(("count", "shape"), caption_share=0.0)
    ctx, _, batch = begin(dual_run, "mllm", data=data)
    loss = ctx.stage.objective(ctx, batch)["loss"]
    loss.backward()
    reached = {name.split(".")[1] for name, p in ctx.modules.named_parameters() if p.grad is not None}
    assert reached == {"language", "embedder"}


def test_a_mean_over_images_weighs_each_conversation_alike_and_may_be_split(dual_run):
    """The loss of a batch is the mean of those of its rows alone; over tokens longer rows weigh more."""
    data = UnifiedLessons(("count", "shape"), per_image=2, caption_share=0.0)
    objective = replace(TINY.stage("mllm").objective, mean_over="images")
    ctx, source, batch = begin(dual_run, "mllm", data=data, objective=objective)
    rows = [replace(batch, pixels=batch.pixels[i : i + 1], keys=batch.keys[i : i + 1], turns=batch.turns[i : i + 1][:1])
            for i in range(4)]
    uneven = replace(batch, turns=(batch.turns[0][:1], *batch.turns[1:]))
    rows[0] = replace(rows[0], turns=(batch.turns[0][:1],))
    with torch.no_grad():
        alone = [float(objective(ctx, row)["loss"]) for row in rows]
        by_tokens = float(replace(objective, mean_over="tokens")(ctx, uneven)["loss"])
        assert float(objective(ctx, uneven)["loss"]) == pytest.approx(np.mean(alone), rel=1e-4) != by_tokens
    stage = replace(TINY.stage("mllm"), objective=objective)
    assert objective.may_split(stage) and not TINY.stage("mllm").objective.may_split(stage)
    with pytest.raises(InputError, match="mean_over: expected tokens or images, got 'rows'"):
        replace(objective, mean_over="rows")


def test_every_full_size_stage_may_be_shared_by_several_processes():
    for name in ("dualtoken-3b", "dualtoken-3b-256"):
        for stage in recipe(name).stages:
            assert stage.objective.may_split(stage), (name, stage.name)


def test_the_share_of_captions_is_that_of_the_steps(dual_run):
    ctx, data, _ = begin(dual_run, "unified", data=UnifiedLessons(("count",), caption_share=0.75))
    kinds = [type(data.get_batch(ctx.stage, step, slice(1))).__name__ for step in range(200)]
    assert 0.65 < kinds.count("Captioned") / 200 < 0.85 and set(kinds) == {"Captioned", "Dialogues"}


def test_the_adaptive_weight_is_the_ratio_of_the_gradients():
    last = nn.Parameter(torch.tensor([1.0, 2.0]))
    reconstruction, adversarial = (last * torch.tensor([3.0, 4.0])).sum(), (last * torch.tensor([0.0, 2.0])).sum()
    weight = adaptive_weight(reconstruction, adversarial, last, lambda own: own)
    assert float(weight) == pytest.approx(5 / (2 + 1e-4))
    assert float(adaptive_weight(reconstruction, adversarial * 1e-6, last, lambda own: own)) == ADAPTIVE_RANGE[1]
    assert float(adaptive_weight(reconstruction * 1e-6, adversarial, last, lambda own: own)) == pytest.approx(0.3)


def test_the_tokenizers_terms_are_weighed_as_named(dual_run):
    objective = DualTokenizerObjective(gan=0.0, perceptual=0.0)
    ctx, _, batch = begin(dual_run, "tokenizer", objective=objective)
    for quantizer in ctx.modules.model.tokenizer.quantizers.values():
        quantizer.codebook.normal_()
    terms = objective(ctx, batch)
    wanted = 20 * terms["mse"] + 5 * (terms["semantic_mse"] + terms["semantic_cosine"])
    wanted = wanted + terms["pooled_mse"] + terms["pooled_cosine"]
    wanted = wanted + 5 * (terms["commitment_pixel"] + terms["commitment_semantic"])
    torch.testing.assert_close(terms["loss"], wanted)


EVERY_TERM = DualTokenizerObjective(lecam=1.0)
# Every weight that each objective reads: see the test after the next.
READ = [
    ("towers", DenseContrastiveObjective(pixel=1.0), ("dense", "pixel")),
    ("tokenizer-gan", EVERY_TERM, tuple(sorted(vars(EVERY_TERM)))),
    (
        "unified", DualNextTokenObjective(depth_decay=0.5, flat=0.5, unconditional=0.4),
        ("pixel", "semantic", "depth_decay", "flat", "unconditional"),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "base", "weight"), [(s, b, w) for s, b, names in READ for w in names])
def test_a_loss_weight_that_an_objective_reads_has_an_effect(dual_run, name, base, weight):
    losses = []
    for factor in (1, 2):
        value = getattr(base, weight) * factor if not weight.endswith("_start") else factor - 1
        changes = {"data": UnifiedLessons(("count",), caption_share=1.0)} if name == "unified" else {}
        ctx, _, batch = begin(dual_run, name, objective=replace(base, **{weight: value}), **changes)
        losses.append(float(ctx.stage.objective(ctx, batch)["loss"].detach()))
    assert losses[0] != losses[1]


def test_no_objective_of_dualtoken_may_read_a_weight_that_is_not_tried_above():
    tried = {type(base): {*names} for _, base, names in READ}
    own = {type(stage.objective) for stage in TINY.stages}
    assert {cls: {item.name for item in fields(cls)} - {"mean_over", "tokenizer_bits"} for cls in own} == tried


def test_an_adversary_must_train():
    stage = replace(TINY.stage("tokenizer-gan"), trainable=("model.tokenizer.decoder.*",))
    with pytest.raises(InputError, match="gan is on, expected discriminator"):
        replace(TINY, stages=(stage,))


def test_captions_that_are_the_same_text_are_no_negatives(dual_run):
    ctx, _, batch = begin(dual_run, "towers")
    objective = ctx.stage.objective
    pooled = torch.randn(4, 32)
    same = objective.pair_terms(ctx, pooled, ("a red circle",) * 4)
    apart = objective.pair_terms(ctx, pooled, ("a red circle", "a blue star", "a green cross", "two stars"))
    assert float(same["pair_accuracy"]) == 1.0
    scale, bias = ctx.modules.pair_logits.log_scale, ctx.modules.pair_logits.bias
    ids = tower_tokens(ctx.prompts.tokenizer, ("a red circle",), 16)
    feature = F.normalize(ctx.modules.model.tokenizer.text_tower(ids), dim=1)
    logits = F.normalize(pooled, dim=1) @ feature.T * scale.exp() + bias
    torch.testing.assert_close(same["loss"], -F.logsigmoid(logits).sum(), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(same["loss"], apart["loss"])


def test_the_recipe_is_planned_with_what_it_prepares(dual_run):
    from spar.training.plan import read_run, resolve

    plan = resolve(TINY, read_run(TINY, dual_run.path / "nowhere"))
    prepares = {stage.config.name: stage.prepares for stage in plan.stages}
    assert prepares["tokenizer"] == ("teacher from encoder", "codebooks from data")
    assert prepares["mllm"] == ("tokenizer rounded as it is stored",)
    assert prepares["tokenizer-gan"] == () and prepares["unified"] == ()


def test_after_step_is_called_once_a_step_after_the_optimizer(dual_run, tmp_path):
    calls = []

    class Noted(DualTokenizerObjective):
        def after_step(self, ctx):
            calls.append(ctx.step)
            super().after_step(ctx)

    ctx, data, _ = begin(dual_run, "tokenizer", objective=Noted(gan=0.0, perceptual=0.0), steps=2)
    ctx.stage.objective.prepare(ctx, data, SimpleNamespace(prepares=("codebooks from data",)))
    assert run_stage(ctx, data, tmp_path, resume=False)
    assert calls == [0, 1]


def test_captions_alone_serve_the_plain_contrastive_objective(dual_run):
    from spar.training.objectives.contrastive import ContrastiveObjective

    changes = {"objective": ContrastiveObjective(), "data": CaptionData(), "trainable": ("model.tokenizer.encoder.*",)}
    ctx, _, batch = begin(dual_run, "towers", **changes)
    terms = ctx.stage.objective(ctx, batch)
    assert set(terms) == {"loss", "contrastive", "pair_accuracy"}


def test_what_a_step_costs_is_counted_part_by_part():
    """Against the parameters: a trained map costs six operations for each of its weights and tokens."""
    from spar.training.estimate import HardwareConfig, estimate

    full = recipe("dualtoken-3b-256")
    whole, last = full, full.stages[-1]
    full = replace(full, stages=(*full.stages[:-1], replace(last, data=CaptionData())))
    tokenizer, unified = estimate(full, HardwareConfig(gpus=8))
    with torch.device("meta"):
        model = full.build({}).model
    weights = {}
    for name in ("language", "pixel_head", "semantic_head"):
        maps = model.get_submodule(name).named_parameters()
        weights[name] = sum(p.numel() for key, p in maps if p.dim() > 1 and "embed" not in key)
    image_tokens, depths = 256, 4
    heads = weights["pixel_head"] + weights["semantic_head"]
    classifiers = 2 * depths * 2048 * 16384                                    # each depth has its own, used once
    least = 6 * (weights["language"] * (image_tokens + 32) + (heads - classifiers) * image_tokens * depths)
    least += 6 * classifiers * image_tokens
    assert least < unified.flops / unified.stage.batch < 1.25 * least
    talk = replace(full, stages=(*full.stages[:-1], replace(last, data=DialogueData())))
    mixed, talk = (estimate(one, HardwareConfig(gpus=8))[-1] for one in (whole, talk))
    least = 6 * weights["language"] * (image_tokens + 190)
    assert least < talk.flops / last.batch < 1.25 * least
    assert mixed.flops == pytest.approx((unified.flops + talk.flops) / 2, rel=1e-6)
    encoder = 6 * 427e6 * image_tokens
    assert tokenizer.flops / tokenizer.stage.batch > encoder and tokenizer.seconds > unified.seconds > 0


def test_prompts_of_edits_in_words_read_the_images_codes(dual_run):
    data = UnifiedLessons(("count",), caption_share=0.0, prompt_share=1.0, edit_prompts=1.0)
    ctx, _, batch = begin(dual_run, "mllm", data=data)
    assert math.isfinite(float(ctx.stage.objective(ctx, batch)["loss"].detach()))


def test_a_built_folder_trains_and_a_trained_one_is_refused_where_its_codebooks_would_go(dual_run, tmp_path):
    """What spar build makes begins the tokenizer; of a finished model the LLM alone goes on."""
    from spar.checkpoints.dualtoken_format import save_dualtoken

    loaded = load_dualtoken(dual_run.path / "model")
    built = replace(loaded, manifest={"parts": {"tokenizer.reduce_pixel": "random weights of seed 0"}})
    save_dualtoken(built, tmp_path / "built")
    begins = replace(TINY, stages=TINY.stages[1:], published=("model.tokenizer.encoder",))
    assert train(begins, tmp_path / "run", stages=("tokenizer",), init_from=tmp_path / "built") is not None
    with pytest.raises(InputError, match="holds a trained tokenizer, of which a finished model keeps no teacher"):
        train(begins, tmp_path / "other", stages=("tokenizer",), init_from=dual_run.path / "model")
    last = train(TINY, tmp_path / "tuned", stages=("finetune",), init_from=dual_run.path / "model")
    before, after = loaded.model.state_dict(), last.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("tokenizer."))
    assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith("language."))


def test_data_sets_on_disk_are_cut_to_the_one_size_of_the_model(dual_run, tmp_path):
    """Also where patches do not divide it, as 14 pixels do not divide 384."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(6):
        noise = np.random.default_rng(index).integers(0, 256, (80, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).save(images / f"{index}.png")
    lines = (f'{{"file_name": "{index}.png", "text": "a red circle"}}\n' for index in range(6))
    (images / "metadata.jsonl").write_text("".join(lines))
    vision, decoder = replace(TINY.model.vision, patch_size=7), replace(TINY.model.decoder, grid=8)
    odd = replace(TINY.model, vision=vision, decoder=decoder)                  # 9 x 9 patches of 63 of 64 pixels
    recipe_on_files = replace(TINY, model=odd, data=FilesData(sets=(str(images),), workers=0))
    stage = replace(TINY.stage("unified"), data=CaptionData())
    shutil.copytree(dual_run.path / "model" / "text_tokenizer", tmp_path / "run" / "text_tokenizer")
    assert train(replace(recipe_on_files, stages=(stage,)), tmp_path / "run") is not None


def test_conversations_on_disk_teach_the_llm_beside_captions(dual_run, tmp_path):
    """The plain form of the shapes world's lessons: captions and conversations in one stage, of both some steps."""
    images = tmp_path / "images"
    images.mkdir()
    for index in range(4):
        Image.new("RGB", (64, 64), (60 * index, 90, 30)).save(images / f"{index}.png")
    spoken = [{"from": "human", "value": "<image>\nwhat color is it?"}, {"from": "gpt", "value": "red"}]
    (images / "talk.json").write_text(json.dumps([{"image": f"{i}.png", "conversations": spoken} for i in range(4)]))
    (images / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a red circle"}\n')
    data = FilesData(sets=(str(images), str(images / "talk.json")), workers=0)
    stage = TINY.stage("unified")
    stage = replace(stage, data=replace(data.nearest(stage.data), dialogue_share=0.5), steps=6)
    shutil.copytree(dual_run.path / "model" / "text_tokenizer", tmp_path / "run" / "text_tokenizer")
    kinds = []

    def report(stage, step, steps, values):
        kinds.append("pixel_1" in values)

    assert train(replace(TINY, stages=(stage,), data=data), tmp_path / "run", report=report) is not None
    assert {*kinds} == {True, False}


def test_the_study_of_one_codebook_trains_every_stage_and_leaves_a_model_that_draws(tmp_path):
    study = recipe("dualtoken-one-codebook")
    model = replace(
        TINY.model, one_codebook=True, shortcut=0.0, pixel=TINY.model.semantic, reads=study.model.reads,
        semantic_given_pixel=False,
    )
    stages = tuple(replace(stage, steps=1, batch=4, warmup=0) for stage in study.stages)
    train(replace(study, model=model, stages=stages, data=TINY.data), tmp_path, device="cpu")
    assert not (tmp_path / "model" / "pixel_head").exists()
    pipe = DualTokenPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    codes = pipe.encode(pipe.generate("a red circle", seed=3).images[0])
    assert torch.equal(codes.pixel, codes.semantic) and int(codes.pixel.max()) < 16


def test_lora_moves_the_llms_additions_alone_and_the_pipeline_takes_them(dual_run, tmp_path):
    base, adapted = dual_run.path / "model", replace(TINY, lora=LoraConfig(rank=2, parts=("language",)))
    train(adapted, tmp_path, stages=("finetune",), init_from=base, device="cpu")
    added = read_tensors(tmp_path / "adapter" / "adapter_model.safetensors")
    assert added and all(float(value.abs().max()) > 0 for value in added.values())
    pipe = DualTokenPipeline.from_pretrained(base, adapter=tmp_path / "adapter", device="cpu")
    assert pipe.origin == {"model": "model", "adapter": "adapter"}
    taken = pipe.model.state_dict()
    merged, plain = (load_dualtoken(path).model.state_dict() for path in (tmp_path / "model", base))
    moved = {key for key in plain if not torch.equal(merged[key], plain[key])}
    assert moved == {key.removeprefix("base_model.model.").split(".lora_")[0] + ".weight" for key in added}
    assert all(key.startswith("language.network.layers.") for key in moved)
    assert all(torch.allclose(merged[key], taken[key], atol=1e-6) for key in merged)


def test_lora_is_for_the_llm_that_is_trained(dual_run, tmp_path):
    with pytest.raises(InputError, match="lora.parts: expected language alone of DualToken, got denoiser, connector"):
        replace(TINY, lora=LoraConfig(rank=2))
    adapted = replace(TINY, lora=LoraConfig(rank=2, parts=("language",)))
    for stage in ("mllm", "tokenizer"):
        with pytest.raises(InputError, match=f"expected stages of the LLM after mllm alone .*got {stage}"):
            train(adapted, tmp_path / "run", stages=(stage,), init_from=dual_run.path / "model")
    assert not (tmp_path / "run").exists()
