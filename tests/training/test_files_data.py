"""Data sets as training data: words with their own pictures, exact positions, shares, refusals, and a training."""

import io
import json
import os
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from spar.checkpoints.spar_format import load_model
from spar.common.errors import InputError
from spar.common.limits import one_reference
from spar.data.batches import Edits, Images
from spar.processing.prompts import PromptEncoder, QuestionAnswer
from spar.recipes import recipe
from spar.recipes.shapes.curricula import CaptionLessons, QuestionData, UnifiedLessons
from spar.recipes.shapes.data import ShapesData
from spar.training.checkpoint import load_group
from spar.training.config import Recipe, StageConfig
from spar.training.data import CaptionData, CaptionDialogueData, DialogueData, ImageData, MixedData
from spar.training.distributed import SINGLE_PROCESS, DistributedContext, ParallelismConfig
from spar.training.feature_cache import write_cache
from spar.training.files_data import FilesData, FilesTrainingData, epochs_per_source, open_sources, weighted_sets
from spar.training.objectives.dual_next_token import DualNextTokenObjective
from spar.training.run_folder import find_text_tokenizer
from spar.training.trainer import train
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import COLORS
from spar.worlds.shapes.tokenizer import build_tokenizer

NAMES = tuple(COLORS)


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def plain(color: str) -> bytes:
    return png(Image.new("RGB", (64, 64), tuple(COLORS[color])))


def write_tar(path: Path, samples: list[dict[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for ending, data in sample.items():
                info = tarfile.TarInfo(f"{number:08}.{ending}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(path)


def generation(count: int = 24) -> list[dict[str, bytes]]:
    """Plain pictures whose caption is their colour."""
    return [{"jpg": plain(NAMES[i % 8]), "txt": f"a {NAMES[i % 8]} square".encode()} for i in range(count)]


def edits(count: int = 16) -> list[dict[str, bytes]]:
    """From one colour to the next, which the instruction names."""
    return [
        {
            "input.jpg": plain(NAMES[i % 8]), "output.jpg": plain(NAMES[(i + 1) % 8]),
            "txt": f"change the background to {NAMES[(i + 1) % 8]}".encode(),
        }
        for i in range(count)
    ]  # fmt: skip


@pytest.fixture
def sets(tmp_path) -> tuple[str, str]:
    return write_tar(tmp_path / "gen.tar", generation()), write_tar(tmp_path / "edit.tar", edits())


def reader(config: FilesData, run: Path, parallel: DistributedContext = SINGLE_PROCESS) -> FilesTrainingData:
    prompts = PromptEncoder(build_tokenizer(), 64)
    return FilesTrainingData(config, replace(recipe("tiny"), max_prompt_tokens=12), prompts, run, parallel)


@pytest.fixture
def training_data(sets, tmp_path):
    """`training_data(**changes)`: the two sets, for one process unless `parallel` says otherwise."""

    def build(
        parallel: DistributedContext = SINGLE_PROCESS, paths=sets, run: Path = tmp_path / "run"
    ) -> FilesTrainingData:
        run.mkdir(exist_ok=True)
        return reader(FilesData(sets=tuple(paths), workers=0), run, parallel)

    return build


@pytest.fixture
def stage(tiny_run):
    return edited(replace(tiny_run.recipe.stage("unified-2"), batch=8), 0.5)


def edited(stage: StageConfig, share: float) -> StageConfig:
    """The stage with a share of edits, as a source of data sets has it."""
    return replace(stage, data=replace(FilesData.nearest(stage.data), edit_share=share))


def on_files(recipe: Recipe, data: FilesData) -> Recipe:
    """The recipe with data sets, as `--data.source files` makes it."""
    return replace(recipe, data=data, stages=tuple(replace(s, data=data.nearest(s.data)) for s in recipe.stages))


def colors(pixels: torch.Tensor) -> list[str]:
    """The nearest colour of each plain picture."""
    table = torch.tensor([COLORS[name] for name in NAMES]) / 255
    means = pixels.mean((2, 3))
    return [NAMES[int((table - mean).square().sum(1).argmin())] for mean in means]


def everything(found: FilesTrainingData, stage, step: int) -> tuple:
    """Whether a step edits, and all of a process's rows of it, in the order of its micro-steps."""
    rows = []
    for batch in next(found.batches(replace(stage, steps=99), step, found.parallel)):
        after = colors(batch.pixels)
        before = colors(batch.references) if isinstance(batch, Edits) else after
        rows += [*zip(batch.texts, before, after, strict=True)]
    return isinstance(batch, Edits), rows


def test_words_stand_with_their_own_pictures_and_both_kinds_come_by_their_share(training_data, stage):
    found, kinds = training_data(), []
    for step in range(12):
        editing, rows = everything(found, stage, step)
        kinds.append(editing)
        assert len(rows) == 8
        for words, before, behind in rows:
            assert words.split()[-1 if editing else 1] == behind
            assert (NAMES[(NAMES.index(before) + 1) % 8] == behind) if editing else before == behind
    assert sum(kinds) in (5, 6, 7)


def test_a_step_is_the_same_whoever_asks_for_it_and_when(training_data, stage):
    walked = training_data()
    rows = [everything(walked, stage, step) for step in range(6)]
    assert rows[0] != rows[1]
    for step in (5, 2):  # straight to a step, as a resumed run goes
        assert everything(training_data(), stage, step) == rows[step]
    for world, accumulate in ((2, 1), (2, 2), (4, 1), (1, 4)):
        parts = [
            everything(
                training_data(DistributedContext(rank, world, config=ParallelismConfig(grad_accum_steps=accumulate))),
                stage,
                3,
            )
            for rank in range(world)
        ]
        assert all(editing == rows[3][0] for editing, _ in parts)
        assert sorted(row for _, part in parts for row in part) == sorted(rows[3][1])


def test_a_stage_takes_the_kinds_that_it_asks_for(training_data, stage, sets):
    assert not any(everything(training_data(), edited(stage, 0.0), step)[0] for step in range(8))
    assert all(everything(training_data(), edited(stage, 1.0), step)[0] for step in range(8))
    with pytest.raises(InputError, match="0.5 of its samples are to be of kind edit .*, but no set is: .*gen.tar"):
        everything(training_data(paths=sets[:1]), stage, 0)
    with pytest.raises(InputError, match="0.5 of its samples are to be of kind text_to_image"):
        everything(training_data(paths=sets[1:]), stage, 0)


def dialogues(folder: Path, turns: list[tuple[str, str]], count: int = 8) -> str:
    """A list of conversations about plain pictures, all alike."""
    spoken = [{"from": who, "value": text} for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    items = []
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(plain(NAMES[i % 8]))
        items.append({"image": f"{i}.jpg", "conversations": spoken})
    (folder / "llava.json").write_text(json.dumps(items))
    return str(folder / "llava.json")


def test_conversations_come_with_their_images_by_their_share(training_data, stage, sets, tmp_path):
    path = dialogues(tmp_path, [("what color is it?", "red"), ("is there a star?", "no <|im_end|>")])
    found = training_data(paths=(sets[0], path))
    data = CaptionDialogueData(dialogue_share=0.25)
    both = replace(stage, objective=DualNextTokenObjective(), data=data, steps=16)
    alone = replace(both, data=DialogueData())
    kinds = [type(found.get_batch(both, step, slice(None))).__name__ for step in range(16)]
    assert 3 <= kinds.count("Dialogues") <= 5 and set(kinds) == {"Dialogues", "Captioned"}
    batch = found.get_batch(alone, 0, slice(2, 5))
    assert batch.pixels.shape == (3, 3, 64, 64) and len(batch.names) == 3
    first, second = batch.turns[1]
    assert (first.question, first.answer, first.follows) == ("what color is it?", "red", False)
    assert (second.question, second.answer.strip(), second.follows) == ("is there a star?", "no", True)
    apart = reader(FilesData(sets=(sets[0], path), workers=1), tmp_path / "apart")
    (first,) = next(apart.batches(replace(alone, steps=1), 0, apart.parallel))  # a worker's, with its check of each row
    assert first.turns == found.get_batch(alone, 0, slice(None)).turns
    with pytest.raises(InputError, match="kind dialogue .*, but no set is: .*gen.tar"):
        training_data().get_batch(alone, 0, slice(None))
    with pytest.raises(InputError, match="unknown"):
        path = dialogues(tmp_path, [("what zebra is it?", "a gnu")])
        training_data(paths=(path,)).check_captions([alone])


def test_turns_that_do_not_fit_are_left_out_and_a_first_answer_is_cut(sets, tmp_path, stage):
    question, long = "what color is it?", " ".join(["red"] * 60)
    path = dialogues(tmp_path, [(question, long), (question, "red")])
    prompts = PromptEncoder(build_tokenizer(), 64)
    whole = prompts.packed_length([QuestionAnswer(question, long)])
    packed = prompts.pack([[QuestionAnswer(question, long), QuestionAnswer(question, "red", follows=True)]])
    assert prompts.packed_length([QuestionAnswer(question, long), QuestionAnswer(question, "red", follows=True)]) == (
        packed.ids.shape[1]
    )
    own = replace(stage, objective=DualNextTokenObjective(), data=DialogueData())
    for limit, turns, words in ((packed.ids.shape[1], 2, 60), (whole + 3, 1, 60), (whole - 20, 1, 40)):
        found = reader(FilesData(sets=(path,), workers=0, dialogue_tokens=limit), tmp_path)
        (row,) = found.get_batch(own, 0, slice(1)).turns
        assert (len(row), len(row[0].answer.split())) == (turns, words)
        assert prompts.packed_length(row) <= limit and row[0].cut is (words < 60)
    for wrong, message in (
        ({"dialogue_tokens": 60}, r"expected a first question and its image of fewer than 60 tokens .*, got 80"),
        ({}, "expected words in each turn, got control tokens alone"),
    ):
        if not wrong:
            path = dialogues(tmp_path, [(question, "<|im_end|> <|im_start|>")])
        found = reader(FilesData(sets=(path,), workers=0, **wrong), tmp_path / message[:8])
        with pytest.raises(InputError, match=message):                          # each is bad, so no neighbour is left
            found.get_batch(own, 0, slice(1))


def test_lessons_of_the_shapes_world_have_a_plain_form_in_data_sets():
    assert FilesData.nearest(UnifiedLessons(("color",), per_image=2, caption_share=0.0)) == DialogueData()
    lesson = QuestionData(("color",))                                          # SPAR's, which come with tags
    assert FilesData.nearest(lesson) is lesson
    unified = FilesData.nearest(UnifiedLessons(("color",), caption_share=0.75))
    assert unified == CaptionDialogueData(dialogue_share=0.25)
    own = UnifiedLessons(("color",))
    assert ShapesData.nearest(own) == own


def test_epochs_count_how_often_each_sample_is_shown(training_data, stage):
    found = training_data()
    few = edited(replace(stage, steps=12, batch=8), 0.25)
    shown = epochs_per_source(few, found.sources, found.weights)
    assert [shown[source.name] for source in found.sources] == pytest.approx([12 * 8 * 0.75 / 24, 12 * 8 * 0.25 / 16])
    assert [*epochs_per_source(edited(few, 0.0), found.sources, [3.0, 1.0]).values()] == pytest.approx([12 * 8 / 24])


def test_a_tokenizer_stage_sees_what_lies_behind_an_edit_and_needs_no_words(training_data, tiny_run, sets, tmp_path):
    mute = write_tar(tmp_path / "mute.tar", [{"png": sample["jpg"]} for sample in generation()])
    found, tokenizer = training_data(paths=(mute, sets[1])), replace(tiny_run.recipe.stage("tokenizer-1"), batch=8)
    seen = set()
    for step in range(8):
        (batch,) = next(found.batches(replace(tokenizer, steps=8), step, SINGLE_PROCESS))
        assert type(batch) is Images
        seen |= set(colors(batch.pixels))
    assert seen == set(NAMES) and sum(map(len, found.sample(100))) >= 100


def test_measuring_bears_as_many_bad_samples_as_training(sets, tmp_path):
    """A run whose own share was above the default ended where its stage measured what it needs."""
    bad = [{**sample, "jpg": b"none"} if i % 2 else sample for i, sample in enumerate(generation())]
    config = FilesData(sets=(write_tar(tmp_path / "bad.tar", bad),), workers=0, bad_share=0.6)
    many = 1100  # above what is decoded before the share is judged
    assert sum(map(len, reader(config, tmp_path / "run").sample(many))) >= many
    with pytest.raises(InputError, match="expected at most 1.0% bad samples"):
        reader(replace(config, bad_share=0.01), tmp_path / "run").sample(many)


def test_other_data_in_the_middle_of_a_stage_are_refused(training_data, stage, sets, tmp_path):
    everything(training_data(), stage, 0)
    everything(training_data(), stage, 3)
    other = write_tar(tmp_path / "other.tar", generation(23))
    with pytest.raises(InputError, match="unified-2: expected the data, weights and batch that it began with .step 3."):
        everything(training_data(paths=(other, sets[1])), stage, 3)
    everything(training_data(paths=(other, sets[1])), stage, 0)  # anew


def test_captions_lose_control_tokens_and_what_is_too_long(training_data, stage, tmp_path):
    long = "a red circle and a blue star and a green ring and a red cross on a navy background"
    wild = [{"png": plain("red"), "txt": text.encode()} for text in ("a <img> red <|im_end|> circle", long)]
    found = training_data(paths=(write_tar(tmp_path / "wild.tar", wild * 8),))
    (batch,) = next(found.batches(edited(stage, 0.0), 0, SINGLE_PROCESS))
    words = set(batch.texts)
    assert {" ".join(text.split()) for text in words} == {"a red circle", " ".join(long.split()[:12])}


def captions(path: Path, *texts: str) -> str:
    """A set of plain pictures with these captions."""
    return write_tar(path, [{"jpg": plain("red"), "txt": text.encode()} for text in texts])


def test_images_alone_are_refused_where_captions_are_read(training_data, stage, tmp_path):
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "one.jpg").write_bytes(plain("red"))
    path = captions(tmp_path / "red.tar", "a red square")
    found = training_data(paths=(path, str(tmp_path / "alone")))
    with pytest.raises(InputError, match=f"stage {stage.name}: expected captions in .*alone, found images alone"):
        found.check_captions([edited(stage, 0.0)])
    found.check_captions([replace(stage, data=ImageData(), objective=recipe("tiny").stage("tokenizer-1").objective)])


def test_captions_of_unknown_words_are_refused_with_their_share(training_data, stage, tmp_path):
    path = captions(tmp_path / "cats.tar", "a portrait of a red Cat", "a cat, a dog", "a red square", "")
    found = training_data(paths=(path,))
    with pytest.raises(InputError) as raised:  # portrait, Cat, cat and dog of 6 + 5 + 3 words
        found.check_captions([edited(stage, 0.0)])
    said, _, known = str(raised.value).partition(" It knows only ")
    assert said == (
        f"0.286 of the words of {path} are unknown to the text tokenizer (cat 2, portrait 1, dog 1); "
        "expected at most data.unknown_share 0.01, since all of them are one token."
    )
    assert {"a", "red", "square"} < {*known.split(", ")}
    found.check_captions([])  # nothing reads them
    found.check_captions([replace(stage, data=ImageData(), objective=recipe("tiny").stage("tokenizer-1").objective)])


def test_a_small_share_of_unknown_words_is_logged(training_data, stage, tmp_path, caplog):
    path = captions(tmp_path / "few.tar", *["a red square and a blue circle above a pony"] * 9, "a zebra")
    found = training_data(paths=(path,))
    found.config = replace(found.config, unknown_share=0.2)
    found.check_captions([edited(stage, 0.0)])
    assert "(pony 9, zebra 1)" in caplog.text
    caplog.clear()
    known = training_data(paths=(captions(tmp_path / "known.tar", "a red square", "<|im_end|> a ring"),))
    known.check_captions([edited(stage, 0.0)])  # control tokens are taken out before they are counted
    assert caplog.text == ""


def test_each_set_is_judged_alone_and_only_where_a_stage_reads_it(training_data, stage, sets, tmp_path):
    strange = captions(tmp_path / "strange.tar", "zebra")
    found = training_data(paths=(*sets, strange))
    with pytest.raises(InputError, match="^1 of the words of .*strange.tar"):
        found.check_captions([edited(stage, 0.5)])
    found.check_captions([edited(stage, 1.0)])  # edits alone


def test_an_open_vocabulary_has_no_unknown_words(training_data, stage, tmp_path):
    found = training_data(paths=(captions(tmp_path / "cats.tar", "a portrait of a cat"),))
    tokenizer = build_tokenizer()
    tokenizer.unk_token = None
    found.prompts = PromptEncoder(tokenizer, 64)
    found.check_captions([edited(stage, 0.0)])


def test_a_training_on_unknown_words_does_not_begin(tiny_run, tmp_path, capsys):
    from spar.cli.main import main

    path, run = captions(tmp_path / "cats.tar", *["a portrait of a cat"] * 8), tmp_path / "run"
    line = ["train", "tiny", "--stage", "unified-2", "--init-from", str(tiny_run.path / "model"), "--run", str(run),
            "--data.source", "files", "--data.sets", path, "--data.workers", "0",
            "--stages.unified-2.data.edit-share", "0"]  # fmt: skip
    for more in (["--dry-run"], []):
        assert main([*line, *more]) == 2
        assert "0.4 of the words" in capsys.readouterr().err and not (run / "unified-2").exists()


def test_a_run_trains_on_data_sets_and_resumes_on_them_bit_by_bit(tiny_run, sets, tmp_path):
    """Pictures and captions of the shapes world, read from files: two stages, with and without a stop."""
    recipe = on_files(tiny_run.recipe, FilesData(sets=(f"2={sets[0]}", sets[1]), workers=1))
    chosen = {"stages": ("tokenizer-1", "unified-2"), "init_from": tiny_run.path / "autoencoder" / "done"}
    values = []
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    assert train(recipe, whole, report=lambda *line: values.append(line), **chosen) is not None
    assert len(values) == 6 and all(np.isfinite(line[3]["loss"]) for line in values)
    assert json.loads((whole / "data.json").read_text()).keys() == {"tokenizer-1", "unified-2"}
    assert (whole / "text_tokenizer").is_dir()

    def stop(stage, step, *_):
        if (stage, step) == ("unified-2", 0):
            os.kill(os.getpid(), signal.SIGINT)

    assert train(recipe, parted, report=stop, **chosen) is None
    assert train(recipe, parted, stages=chosen["stages"], resume=True) is not None
    ends = [load_group(run / "unified-2" / "done", "modules") for run in (whole, parted)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_pictures_of_the_world_come_through_a_tar_unchanged(tiny_run, tmp_path, stage):
    images = [render(scene_at("train", i)) for i in range(8)]
    path = write_tar(tmp_path / "world.tar", [{"png": png(Image.fromarray(x)), "txt": b"a red circle"} for x in images])
    config = FilesData(sets=(path,), workers=0)
    found = reader(config, tmp_path)
    (batch,) = next(found.batches(edited(stage, 0.0), 0, SINGLE_PROCESS))
    shown = (batch.pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert sorted(x.tobytes() for x in shown) == sorted(x.tobytes() for x in images)


def test_a_stage_of_its_own_side_and_several_proportions_squashes_nothing(tiny_run, tmp_path):
    wide = [{"png": png(Image.new("RGB", (120, 60), "red"))} for _ in range(24)]
    config = FilesData(sets=(write_tar(tmp_path / "wide.tar", wide),), workers=0, max_aspect=2.0)
    found = reader(config, tmp_path)
    small = replace(tiny_run.recipe.stage("tokenizer-1"), data=ImageData(image_size=32))
    (batch,) = next(found.batches(small, 0, SINGLE_PROCESS))
    shape = batch.pixels.shape
    assert shape[-1] > 1.5 * shape[-2] and abs(shape[-1] * shape[-2] / 32**2 - 1) < 0.2


def test_a_stage_may_start_from_another_of_its_own_run(tiny_run, sets, tmp_path):
    recipe = on_files(tiny_run.recipe, FilesData(sets=sets, workers=0))
    train(recipe, tmp_path / "run", stages=("unified-2",), init_from=tiny_run.path / "model")
    done = tmp_path / "run" / "unified-2" / "done"
    assert train(recipe, tmp_path / "run", stages=("unified-3",), init_from=done) is not None


def test_settings_without_sense_are_refused(tiny_run, tmp_path, sets):
    assert weighted_sets(("0.5=a.tar", "b=1.tar", "c.tar")) == [(0.5, "a.tar"), (1.0, "b=1.tar"), (1.0, "c.tar")]
    for wrong, said in (
        ({"sets": ()}, "data.sets: expected paths of data sets, got none"),
        ({"sets": ("0=x.tar",)}, "weight above 0, got '0=x.tar'"), ({"workers": -1}, "data.workers"),
        ({"bad_share": 2.0}, "data.bad_share"),
        ({"unknown_share": -0.1}, "data.unknown_share: expected 0 to 1"), ({"max_aspect": 0.5}, "data.max_aspect"),
        ({"max_aspect": 9.0}, "max_aspect: expected 1 to 8, got 9"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            FilesData(**{"sets": sets, **wrong})
    with pytest.raises(InputError, match="tokenizer-3: expected a discriminator .* sides of 40 pixels, got .* 48 and"):
        bold = replace(tiny_run.recipe.discriminator, layers=4)
        replace(tiny_run.recipe, data=FilesData(sets=sets, max_aspect=3.0), discriminator=bold)
    recipe = replace(tiny_run.recipe, data=FilesData(sets=sets))
    with pytest.raises(
        InputError,
        match=r"data.source files has images, captions, captions_and_edits, dialogues, captions_and_dialogues, which "
        r"is nothing for mllm \(questions\), unified-2 \(lessons\) \(--stage",
    ):
        train(recipe, tmp_path / "run", stages=("mllm", "dit", "unified-2"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="its words want the text tokenizer of a SPAR folder"):
        find_text_tokenizer(recipe, tmp_path / "run", None)


def test_lessons_become_plain_captions_and_edits_and_other_stages_keep_what_they_read(tiny_run):
    """What data sets have nothing for stays, so that `check` can name it."""
    plain = {stage.name: FilesData.nearest(stage.data) for stage in tiny_run.recipe.stages}
    lessons = ("unified-1", "unified-2", "unified-3")
    shares = {name: tiny_run.recipe.stage(name).data.edit_share for name in lessons}
    assert shares["unified-1"] == 0 < shares["unified-2"]
    assert {name: plain[name] for name in lessons} == {name: MixedData(share) for name, share in shares.items()}
    assert plain["dit"] == CaptionData() and plain["tokenizer-1"] == ImageData()
    language = ("mllm", "mllm-2", "mllm-3", "mllm-4")
    assert all(plain[name] == tiny_run.recipe.stage(name).data for name in ("encoder", *language))
    assert type(FilesData.nearest(CaptionLessons(position_captions=1.0))) is CaptionData
    assert FilesData.nearest(ImageData(image_size=32)) == ImageData(image_size=32)


def test_an_edit_of_two_references_is_set_aside_in_training_and_in_the_cache(tiny_run, sets, tmp_path):
    """It ended the run, and on resume again, while the cache silently took the first reference."""
    both = [
        {("input_0.jpg" if name == "input.jpg" and i == 5 else name): data for name, data in sample.items()}
        for i, sample in enumerate(edits())
    ]
    both[5]["input_1.jpg"] = plain(NAMES[0])
    path, run = write_tar(tmp_path / "two.tar", both), tmp_path / "run"
    recipe = on_files(tiny_run.recipe, FilesData(sets=(sets[0], path), workers=0, bad_share=0.5))
    stages = tuple(edited(replace(s, steps=6), 1.0) if s.name == "unified-2" else s for s in recipe.stages)
    recipe = replace(recipe, stages=stages)
    assert train(recipe, run, stages=("unified-2",), init_from=tiny_run.path / "model") is not None
    named = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert {row["key"] for row in named} == {"00000005"}
    assert {row["reason"] for row in named} == {one_reference(2)}
    tokenizer = load_model(tiny_run.path / "model").model.tokenizer
    assert write_cache(tokenizer, open_sources(recipe.data), tmp_path / "features", side=64) == 1


def test_pipeline_and_api_refuse_a_second_reference_in_the_same_words(tiny_run):
    from spar.inference.pipeline import SparPipeline

    pipe = SparPipeline.from_pretrained(tiny_run.path / "model", device="cpu")
    image = Image.new("RGB", (64, 64))
    with pytest.raises(InputError, match="expected one reference image for each edit, got a list of 2: the model is"):
        pipe.edit([[image, image]], "remove the red circle")


def test_workers_budget_and_place_of_the_data_may_change_when_a_run_is_resumed(tmp_path):
    from spar.training.run_folder import open_run

    base = replace(recipe("tiny"), data=FilesData(sets=("/mnt/a/photos",)))
    open_run(tmp_path / "run", base, fresh=True)
    for change in ({"workers": 1}, {"bad_share": 0.02}, {"sets": ("/mnt/b/photos",)}):
        open_run(tmp_path / "run", replace(base, data=replace(base.data, **change)), fresh=False)
    with pytest.raises(InputError, match=r"data\.color_profiles: "):
        open_run(tmp_path / "run", replace(base, data=replace(base.data, color_profiles=False)), fresh=False)
    with pytest.raises(InputError, match=r"data\.max_aspect: 1\.0, now 2\.0"):
        open_run(tmp_path / "run", replace(base, data=replace(base.data, max_aspect=2.0)), fresh=False)


def test_colour_profiles_may_be_left_unused(tmp_path):
    """A profile that swaps red and blue, so that its use shows."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (250, 10, 10)).save(out, "PNG", icc_profile=bytes(profile))
    path = write_tar(tmp_path / "tagged.tar", [{"png": out.getvalue(), "txt": b"a red square"}] * 8)
    for used, color in ((True, [10, 10, 250]), (False, [250, 10, 10])):
        config = FilesData(sets=(path,), workers=0, color_profiles=used)
        (pixels, *_) = reader(config, tmp_path / str(used)).sample(1)
        assert np.abs(pixels[0].mean((1, 2)).numpy() * 255 - color).max() < 3
