"""The probes of binding: on the bundled weights they say what docs/log.md says of them, and planted tags are found."""

import importlib.util
import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from spar.checkpoints.bundled import bundled_folder
from spar.checkpoints.spar_format import load_model
from spar.evaluation.shapes_edit import needs_binding
from spar.recipes import recipe
from spar.training.checkpoint import load_group
from spar.training.plan import read_run, resolve
from spar.worlds.shapes.captions import Claim, Group, Relation, parse
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.detector import detect, satisfies
from spar.worlds.shapes.edits import ALL_EDIT_KINDS, Edit
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import Object, Scene

DOCS = Path(__file__).parent.parent / "docs"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_probes_find_that_the_bundled_model_binds_and_its_router_chooses(monkeypatch, capsys):
    probes = script("probes")
    monkeypatch.setattr(probes, "ITEMS", 1)
    monkeypatch.setattr("sys.argv", ["probes.py"])
    probes.main()
    edits, bound, routing, drawn, *nouns = capsys.readouterr().out.splitlines()
    assert edits.startswith("shapes-edit, said: recolor 1.00")
    assert bound.startswith("shapes-edit-bind, said: recolor ")
    first, entropy = re.fullmatch(r"routing: ([\d.]+), .*; entropy ([\d.]+) nats", routing).groups()
    assert float(first) < 0.4 and 0.2 < float(entropy) <= 1.39
    assert re.fullmatch(r"shapes-gen: [\d.]+ routed, [\d.]+ by the plain mean", drawn)
    colors = [float(re.search(r"color ([\d.]+)", line).group(1)) for line in nouns]
    assert len(nouns) == 4 and min(colors) > 0.7 and max(colors) > 0.97  # of eight colours
    assert all("shape 1.00" in line for line in nouns)  # the noun itself


@pytest.mark.parametrize(
    ("first", "second", "fault"),
    [
        ("a large red circle on column two row two", "a small red circle on column six row six", ""),
        ("a large red circle on column two row two", "a small red circle on column four row two", ""),
        ("a large red circle on column two row two", "a small red circle on column three row two", "near"),
        ("a large red circle on column two row two", "a small blue star on column six row six", "words"),
        ("a large red circle on column two", "a small red circle on column six row six", "form"),
        ("a red circle on column two row two", "a small red circle on column six row six", "form"),
    ],
)
def test_planted_faults_of_layouts_are_found(first, second, fault):
    text = f"{first}, {second} on a navy background"
    assert script("layouts").fault(text, [parse("two red circles")]) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "form"), ("two red circles", "form"),
        ("a small red circle on column two row two on a navy background", "words"),
    ],
)  # fmt: skip
def test_what_is_no_layout_or_lacks_objects_is_a_fault(text, fault):
    assert script("layouts").fault(text, [parse("two red circles")]) == fault


def test_a_relation_that_the_cells_of_a_layout_do_not_hold_is_a_fault():
    text = "a small red circle on column {} row two, a small blue star on column {} row two on a navy background"
    found, claims = script("layouts").fault, [parse("a red circle to the left of a blue star")]
    assert found(text.format("two", "six"), claims) == ""
    assert found(text.format("six", "two"), claims) == "words"


def test_captions_of_the_lessons_are_claims_that_their_own_scenes_satisfy_and_others_do_not():
    layouts, rng = script("layouts"), np.random.default_rng(0)
    for kind, claims_of in (("related", layouts.related_claims), ("divided", layouts.divided_claims)):
        scenes = [scene_at("validation", index, {"shared": 1.0, "twins": 1.0}) for index in range(80)]
        texts = [(scene, layouts.LESSONS[kind](scene, rng)) for scene in scenes]
        told = [(detect(render(scene)), claims_of(text)) for scene, text in texts if text]
        assert len(told) > 20 and all(satisfies(seen, claim)[0] for seen, claims in told for claim in claims)
        others = [satisfies(seen, claims[0])[0] for (seen, _), (_, claims) in pairwise(told)]
        assert sum(others) < len(others) / 10
    below = layouts.related_claims("two blue stars above a red circle and a green ring on a navy background")
    assert below == [
        Claim(
            "navy", (Group("star", "blue", None, 2), Group("circle", "red", None, 1), Group("ring", "green", None, 1)),
            Relation("above", 0, other),
        )
        for other in (1, 2)
    ]  # fmt: skip


def test_the_bundled_models_layouts_are_sound_where_there_is_room(monkeypatch, capsys):
    layouts = script("layouts")
    monkeypatch.setattr(layouts, "CAPTIONS", 8)
    monkeypatch.setattr(layouts, "KINDS", ("two", "count"))
    monkeypatch.setattr("sys.argv", ["layouts.py"])
    layouts.main()
    two, count, related, divided = capsys.readouterr().out.splitlines()
    assert two == "two: sound 1.00" and related.startswith("related: ") and divided.startswith("divided: ")
    assert re.fullmatch(r"count: sound \d\.\d\d(; (form|near|words) [\d.]+(, (near|words) [\d.]+)*)?", count)


def test_layouts_of_a_stage_are_read_from_its_weights(tiny_run, monkeypatch, capsys):
    layouts = script("layouts")
    monkeypatch.setattr(layouts, "CAPTIONS", 2)
    monkeypatch.setattr(layouts, "KINDS", ("two",))
    seen = []
    monkeypatch.setattr(layouts.SparPipeline, "write_layouts", lambda self, *_, **__: seen.append(self) or ["", ""])
    end = tiny_run.path / "mllm-2" / "done"
    monkeypatch.setattr("sys.argv", ["layouts.py", str(tiny_run.path / "model"), str(end)])
    layouts.main()
    kinds = ("two", "related", "divided", *(f"edit, {kind}" for kind in ALL_EDIT_KINDS))
    assert capsys.readouterr().out.splitlines() == [f"{kind}: sound 0.00; form 1.00" for kind in kinds]
    weights = load_group(end, "modules")
    own = seen[0].model.language.state_dict()
    assert all(torch.equal(value, weights[f"model.language.{name}"]) for name, value in own.items())


def test_the_tags_of_an_edit_are_counted_on_changed_and_on_kept_tokens(start, monkeypatch):
    probe = script("edit_tags")
    begun = start("mllm-2")
    items = {item.edit.kind: item for item in probe.edit_items(probe.EvalOptions(limit=1), "shapes-edit")}
    item = items["recolor"]
    modules, tags = begun.modules, begun.modules.dense_head.tags

    def say(scene) -> None:
        """Let the head read the tags of a scene, whatever the states."""
        for name, values in probe.dense_tags([scene], 8).items():
            if name in tags:
                monkeypatch.setattr(tags[name], "forward", lambda _, v=values: torch.nn.functional.one_hot(v[0], 9))

    say(item.edit.target)
    assert probe.shares(modules, begun.ctx.prompts, item) == (1.0, 1.0)
    say(item.scene)  # as if nothing had been asked for
    assert probe.shares(modules, begun.ctx.prompts, item) == (0.0, 1.0)


def test_the_tags_of_a_runs_stage_are_printed_by_kind(tiny_run, monkeypatch, capsys):
    probe = script("edit_tags")
    monkeypatch.setattr(probe, "ITEMS", 1)
    monkeypatch.setattr("sys.argv", ["edit_tags.py", str(tiny_run.path), "mllm-2"])
    probe.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11 and all(re.search(r": changed [\d.]+, kept [\d.]+, items [\d.]+$", line) for line in lines)


def test_the_losses_of_codes_are_those_of_training_at_both_kinds_of_patches(dual_run):
    """With an untrained LLM each code is about as likely as any other; shares are by the number of patches then."""
    probe = script("code_losses")
    pipe = probe.load_pipeline(dual_run.path / "model", device="cpu", dtype=torch.float32)
    found, decibels = probe.code_losses(pipe, 8)
    assert [(one.name, one.depth) for one in found] == [
        ("pixel", 1), ("pixel", 2), ("semantic", 1), ("semantic", 2)
    ]  # fmt: skip
    assert all(1.5 < one.flat < 4 and 1.5 < one.other < 4 and 0.3 < one.share < 0.95 for one in found)
    assert len(decibels) == 2 and all(value > 0 for value in decibels)


def test_stages_of_one_name_in_several_runs_add_up(tmp_path):
    bundle, runs = script("bundle"), [tmp_path / name for name in "ab"]
    for number, run in enumerate(runs):
        (run / "dit" / "done").mkdir(parents=True)
        (run / "recipe.json").write_text('{"stages": [{"name": "dit"}, {"name": "unified-1"}]}')
        (run / "dit" / "done" / "meta.json").write_text(f'{{"step": {3 + number}, "seconds": 1.5}}')
        (run / "metrics.jsonl").write_text('{"stage": "dit", "step": 2}\n{"stage": "unified-1", "step": 0}\n')
    assert bundle.stages(runs) == {"dit": {"steps": 7, "seconds": 3.0}}
    assert [json.loads(line)["step"] for line in bundle.curves(runs)] == [2, 5]


def test_a_finished_model_becomes_the_start_of_a_run(tmp_path, monkeypatch):
    warm, made = script("warm_start"), recipe("shapes")
    modules = warm.in_todays_form(made, bundled_folder("spar"))
    own = load_model(bundled_folder("spar")).model.state_dict()
    kept = [k for k, value in modules.model.state_dict().items() if k in own and torch.equal(value, own[k])]
    assert len(kept) > 0.9 * len(own) and "language.network.layers.0.mlp.up_proj.weight" in kept
    shares = [float(warm.fit_read_outs(made, modules, scenes=16, steps=steps)) for steps in (1, 120)]
    assert shares[1] > shares[0] + 0.2
    warm.write_end(tmp_path, "mllm-2", made, modules.state_dict())
    monkeypatch.setattr("sys.argv", ["warm_start.py", "--unified", str(tmp_path), "mllm-2"])
    warm.main()
    ended = load_group(tmp_path / "unified-1" / "done", "modules")
    assert all(torch.equal(value, ended[name]) for name, value in modules.state_dict().items())
    monkeypatch.setattr("sys.argv", ["warm_start.py", "--router", str(tmp_path), "mllm-2"])
    warm.main()
    planned = resolve(made, read_run(made, tmp_path / "run", tmp_path / "unified-1" / "done"), stages=("unified-2",))
    assert planned.stages[0].start.source == "folder" and planned.stages[0].prepares == ("teacher mean",)
    modules.load_state_dict(load_group(tmp_path / "unified-1" / "done", "modules"))
    ids = torch.tensor([[7, 9, 11, 12]])
    with torch.no_grad():
        weights = modules.model.condition(ids, torch.ones_like(ids)).weights
    assert float((weights - 1 / 4).abs().max()) < 0.2


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("no small red circle on column two row two, a small blue star on column two row two", ""),
        ("no small red circle on column two row three, a small blue star on column three row two", ""),
        ("no small red circle on column four row two, a small blue star on column two row two", "place"),
        ("no small red circle on column two row two, a large blue star on column two row two", "words"),
        ("a small blue star on column two row two", "words"),
        ("no small red circle on column two row nine, a small blue star on column two row two", "form"),
        ("", "form"),
    ],
)
def test_planted_faults_of_layouts_of_edits_are_found(text, fault):
    circle, ring = Object("circle", "red", "small", 12, 12), Object("ring", "red", "small", 40, 40)
    star = Object("star", "blue", "small", 12, 12)
    scene = Scene("gray", (circle, ring), "two")
    edit = Edit("replace", "replace the circle with a blue star", replace(scene, objects=(star, ring)))
    assert script("layouts").edit_fault(text, scene, edit) == fault


@pytest.mark.parametrize(
    ("place", "cell", "fault"),
    [
        (False, "two row two", ""), (False, "five row six", "near"), (True, "two row six", ""),
        (True, "eight row six", "place"),
    ],
)  # fmt: skip
def test_planted_faults_of_added_objects_are_found(place, cell, fault):
    ring, star = Object("ring", "red", "small", 40, 44), Object("star", "blue", "small", 20, 44)
    scene = Scene("gray", (ring,), "single")
    edit = Edit("add", "", replace(scene, objects=(ring, star)), ("left", ring) if place else None)
    assert script("layouts").edit_fault(f"a small blue star on column {cell}", scene, edit) == fault


def test_the_share_of_right_edits_at_a_guidance_is_that_of_the_scale_that_draws_the_targets():
    """On validation scenes, ten and twelve edits of two a kind, those that bind among objects alike."""
    edit_guidance = script("edit_guidance")
    plain, binding = (edit_guidance.items(2, binding=kind) for kind in (False, True))
    assert [len(plain), len(binding)] == [10, 12]
    assert {item.scene.kind for item in binding} <= {"shared", "twins"} and all(
        needs_binding(item.scene, item.edit) for item in binding
    )

    class Drawing:
        """Draws the target at a scale of 2, and gives the image back at others."""

        def __init__(self, items):
            self.targets = {item.edit.instruction: item.edit.target for item in items}

        def check_text(self, text, what):
            assert text in self.targets

        def edit(self, images, instructions, *, seed, guidance_scale):
            drawn = [Image.fromarray(render(self.targets[text])) for text in instructions]
            return SimpleNamespace(images=drawn if guidance_scale == 2 else images)

    for items in (plain, binding):
        assert len({item.edit.instruction for item in items}) == len(items)
        assert [edit_guidance.share_right(Drawing(items), items, scale) for scale in (1.0, 2.0)] == [0.0, 1.0]
