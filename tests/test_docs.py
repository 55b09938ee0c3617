"""The documents stay true: names exist, examples run, scores are those of the results files, lines are short."""

import importlib
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from spar.checkpoints.bundled import BUNDLED_MODELS
from spar.checkpoints.eight_bits import rounded
from spar.checkpoints.safetensors_io import read_tensors, write_tensors
from spar.checkpoints.spar_format import load_model
from spar.common.errors import InputError
from spar.evaluation.benchmarks import BENCHMARKS
from spar.evaluation.study import ENDPOINTS, bundled_studies, read_study, trainings
from spar.evaluation.study_statistics import STUDIED
from spar.inference.pipeline import BUNDLED
from spar.processing.prompts import known_words
from spar.recipes import REGISTRY, recipe
from spar.recipes.spar import SPAR_1B
from spar.worlds.shapes.captions import DESCRIBE, caption, parse
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.render import render
from spar.worlds.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES
from spar.worlds.shapes.tokenizer import split_words

ROOT = Path(__file__).parents[1]
GUIDES = [path for path in (ROOT / "docs").glob("*.md") if path.name != "log.md"]  # the log keeps the names of its days
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTED = ("docs", "integrations", "notebooks", "examples")
MAX_LINE, MAX_README_LINES, MAX_IMAGE_BYTES = 120, 150, 200_000
NAMES = sorted(set(re.findall(r"`(spar(?:\.\w+)+)`", "".join(p.read_text() for p in GUIDES))))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_in_the_documents_exists(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} is no module")


def test_the_map_names_the_main_classes():
    assert {"spar.models.denoiser.Denoiser", "spar.losses.alignment.alignment_loss"} <= set(NAMES)


def load(name: str) -> ModuleType:
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Scores: docs/results has the files, docs/scores.py the tables, docs/bundle.py the manifest


TABLES = load("scores").tables()


@pytest.mark.parametrize(("document", "mark"), TABLES)
def test_the_tables_of_scores_are_those_of_the_results_files(document, mark):
    """If not: python docs/scores.py"""
    text = (ROOT / document).read_text(encoding="utf-8")
    shown = re.search(rf"<!-- {mark} -->\n(.*?)<!-- end of {mark} -->", text, re.S)[1]
    assert shown == TABLES[document, mark] and shown.count("\n") > 5


def test_the_summary_of_the_readme_is_part_of_the_full_table():
    full = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    full, marks = full.split("<!-- scores of DualToken -->"), TABLES["README.md", "scores"].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in marks]
    shown = 0
    for title, _, *scores in rows:
        for found, table in zip(scores, full, strict=True):
            if score := re.fullmatch(r"([\d.]+(?: dB)?) \((.*)\)", found):
                shown += 1
                assert re.search(rf"^\| {title} \|.*\| {score[1]} \| {score[2]} \|", table, re.M)
    assert len(rows) == 7 and shown == 12                                      # SPAR has six of seven, so has DualToken


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_the_manifests_of_the_bundled_weights_have_the_scores_of_the_results_files(name):
    assert manifest_scores(name) == load("bundle").measured(name)


@pytest.mark.parametrize("name", BUNDLED_MODELS)
def test_the_model_card_and_spar_info_show_the_scores_of_the_manifest(name, capsys, monkeypatch, tmp_path):
    """If not: python docs/bundle.py NAME --scores"""
    from spar.checkpoints.spar_format import CARD
    from spar.cli.main import main

    monkeypatch.chdir(tmp_path)  # no folder of a bundled model's name
    expected = manifest_scores(name)
    assert expected
    assert main(["info", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["manifest"]["scores"] == expected
    card = (BUNDLED_MODELS[name] / CARD).read_text(encoding="utf-8")
    for title, scores in expected.items():
        for name, value in scores.items():
            assert f"| {title} | {name} | {value:g} |" in card


@pytest.mark.parametrize("part", ["pixel_head", "tokenizer"])
def test_eight_bits_hold_matrices_alone(part, dual_run, tmp_path):
    script, path = load("bundle"), tmp_path / part / "model.safetensors"
    shutil.copytree(dual_run.path / "model" / part, tmp_path / part)
    before = {name: rounded(name, value, 8) for name, value in read_tensors(path).items()}
    write_tensors(before, path)
    script.store_in_eight_bits(tmp_path, part)
    kept = {name for name, value in before.items() if value.dim() == 1 or "position" in name or "quantizer" in name}
    for name, value in read_tensors(path).items():
        assert value.dtype == (before[name].dtype if name in kept else torch.float8_e4m3fn), name
        assert torch.equal(value.to(before[name].dtype), before[name]), name


def test_a_tokenizer_that_was_not_trained_for_eight_bits_is_not_stored_so(dual_run):
    """Of other weights it would give other codes than the LLM was trained on."""
    script, tensors = load("bundle"), read_tensors(dual_run.path / "model" / "tokenizer" / "model.safetensors")
    script.check_tokenizer(tensors)
    name = "encoder.network.head.mlp.fc1.weight"
    with pytest.raises(InputError, match=f"{name} is not rounded to 8 bits: expected a model trained with"):
        script.check_tokenizer({**tensors, name: tensors[name] + 2**-12})


def manifest_scores(name: str) -> dict[str, dict[str, float]]:
    return json.loads((BUNDLED_MODELS[name] / "manifest.json").read_text(encoding="utf-8"))["scores"]


# Evidence


EVIDENCE = load("evidence")


def test_the_tables_of_evidence_are_those_of_the_results_files():
    """If not: python docs/evidence.py"""
    text = EVIDENCE.DOCUMENT.read_text(encoding="utf-8")
    for mark, table in EVIDENCE.tables().items():
        assert text.split(f"<!-- {mark} -->\n")[1].split(f"<!-- end of {mark} -->")[0] == table


def test_what_evidence_says_of_early_exit_is_in_its_results():
    found = json.loads(EVIDENCE.EARLY_EXIT.read_text())["results"]
    by_threshold = [one for name, one in found.items() if not name.startswith("all")]
    for name in ("saved", "error"):
        assert sorted(one[name] for one in by_threshold) == [one[name] for one in by_threshold]
    assert found["0"]["error"] == 0 and found["0"]["left_after"]["8"] == 1
    text = " ".join(EVIDENCE.DOCUMENT.read_text(encoding="utf-8").split())
    said = re.search(r"words of size have (\S+) layers in .*? those of color (\S+), but .*? of all, (\S+);", text)
    kinds = found["0.3"]["mean_layers"]
    assert said.groups() == tuple(f"{kinds[name]:.1f}" for name in ("size word", "color word", "image"))
    said = re.search(r"the error is (\S+) times that at 0.4 .*? layer 4 (\S+) times that at 0.7;", text)
    pairs = (("all after 6", "0.4"), ("all after 4", "0.7"))
    assert said.groups() == tuple(f"{found[one]['error'] / found[other]['error']:.1f}" for one, other in pairs)


@pytest.mark.parametrize("claim", EVIDENCE.CLAIMS, ids=lambda claim: claim.number)
def test_a_claim_is_about_arms_and_endpoints_of_its_study(claim):
    study = read_study(Path(claim.study))
    for one in claim.expected:
        endpoint, _, measure = one.endpoint.partition(", ")
        assert one.arm in study.arms and endpoint in study.endpoints
        assert not measure or measure in STUDIED[endpoint]


def test_verdicts_come_from_the_differences(tmp_path, monkeypatch):
    monkeypatch.setattr(EVIDENCE, "STUDIES", tmp_path)
    arms = [("last", "higher: worse", 0.1), ("average", "lower: better", -0.1), ("again", "undecided (x)", 0.0)]
    differences = [
        {
            "arm": arm, "endpoint": "shapes-loss", "value": value, "low": value - 0.01, "high": value + 0.01,
            "verdict": said, "main": True,
        }
        for arm, said, value in arms
    ]  # fmt: skip
    values = {
        "differences": differences, "seconds": {"a": 60, "b": 60}, "study": {"seeds": [0, 1, 2]},
        "machine": {"cores": 2, "cpu": "a CPU"}, "versions": {"torch": "2"}, "holds": True,
    }  # fmt: skip
    (tmp_path / "routing.json").write_text(json.dumps(values))
    text = EVIDENCE.claims()
    assert "| `last`, shapes-loss | +0.1 (+0.09 to +0.11) | supports it |" in text
    assert "| `average`, shapes-loss | -0.1 (-0.11 to -0.09) | contradicts it |" in text
    assert "| `global`, shapes-loss |  | not measured |" in text and "study `tokenizer` |  | not run |" in text
    assert "| `routing` | 3 | 6 | contains 0 | 2 cores of a CPU, torch 2 |" in text
    same = EVIDENCE.Expected("external", "shapes-loss", "same")
    for words, told in (
        ("undecided (at least 0.1 would show)", "no difference seen (at least 0.1 would show)"),
        ("lower: better", "contradicts it: the arm is better"),
        ("higher: worse", "supports it: the arm is worse"), ("undecided (one seed)", "undecided (one seed)"),
    ):
        assert EVIDENCE.verdict(same, {"verdict": words}) == told
    differences[-1] |= {"low": 0.1}
    differences.append({**differences[0], "endpoint": "shapes-loss, margin", "verdict": "lower: worse", "main": False})
    (tmp_path / "routing.json").write_text(json.dumps(values))
    text = EVIDENCE.claims()
    assert "| supports it; the A/A arm does not hold |" in text
    assert "`last`, shapes-loss, margin | +0.1 (+0.09 to +0.11) | supports it (p not corrected) |" in text


def test_what_words_read_is_a_table_for_each_study(tmp_path, monkeypatch):
    monkeypatch.setattr(EVIDENCE, "STUDIES", tmp_path)
    (tmp_path / "words").mkdir()
    chooses = {"layers": [2, 4], "entropy": 0.5, "weights": {"query": [0.5, 0.5], "verb": [0.1, 0.9]}}
    same = {"layers": [2, 4], "entropy": 0.0, "weights": {"query": [0.0, 1.0], "verb": [0.0, 1.0]}}
    for name in ("a", "b"):
        (tmp_path / "words" / f"{name}.json").write_text(json.dumps({"arms": {"dtr": chooses, "last": same}}))
    text = EVIDENCE.claims()
    assert text.count("| `dtr` | 2, 4 | 0.50 | 0.50 0.50 | 0.10 0.90 |\n") == 2
    assert "`last`" not in text.split("Mean", 1)[1]
    assert text.count("\n\nMean weights of the routed layers in study") == 2


def test_the_example_of_the_guide_to_studies_is_a_study(tmp_path):
    """Each of its variants changes what it says, and the guide names the bundled studies and the endpoints."""
    guide = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", guide, re.M | re.S)
    (tmp_path / "example.yaml").write_text(text)
    study = read_study(tmp_path / "example.yaml")
    planned = trainings(study, tmp_path, REGISTRY, recipe, None)
    found = {arm: one.recipe for (arm, seed), one in planned.items() if seed == 0}
    assert {*found} == {"self", "again", "none", "plain-cosine"}
    for arm, align, center in (("self", 0.5, True), ("none", 0.0, True), ("plain-cosine", 0.5, False)):
        stage = found[arm].stage("unified-2")
        assert (stage.steps, stage.lr_end, stage.objective.align) == (1100, 1e-4, align)
        assert found[arm].alignment.center is center
    listed = re.search(r"has the bundled studies: (.*?)\.", guide, re.S)[1]
    assert sorted(re.findall(r"`(.*?)`", listed)) == bundled_studies()
    for name in ENDPOINTS.keys() - BENCHMARKS.keys():
        assert f"`{name}`:" in guide


def test_the_departures_of_the_guide_to_training_are_the_recipes():
    """The values in its bold headings are those of `shapes`, and all values of a field are the heading's."""
    own = recipe("shapes")
    stages, model = {stage.name: stage for stage in own.stages}, own.model

    def values(part: str, name: str) -> dict[str, float]:
        """The values of a field of all stages' objectives or data that have it, where it is on."""
        found = {stage: getattr(getattr(one, part), name, 0) for stage, one in stages.items()}
        return {stage: value for stage, value in found.items() if value}

    def said(part: str, name: str, *names: str) -> list[str]:
        """The values of these stages; no other has one."""
        found = values(part, name)
        assert {*found} == {*names}, name
        return [f"{found[stage]:g}" for stage in names]

    llm = ("mllm", "mllm-2", "mllm-3", "mllm-4")
    tokenizer, unified = [f"tokenizer-{n}" for n in "123"], ["unified-2", "unified-3"]
    fused, second, third = said("objective", "native_fused", *tokenizer)
    (penalty,) = said("objective", "latent_penalty", "autoencoder")
    (noise,) = {*said("objective", "latent_noise", "autoencoder", *tokenizer[1:])}
    (pixel,) = said("objective", "pixel", "encoder")
    (tags,) = {*said("objective", "edit_tags", *llm)}
    (balance,) = {*said("objective", "balance", "unified-1", *unified)}
    prompts, per_image = said("data", "prompt_share", *llm), said("data", "per_image", *llm)
    assert (prompts[3], per_image[2:]) == (prompts[1], per_image[:2])
    (placed,) = said("data", "position_captions", "unified-2")
    layouts = values("data", "layouts")
    assert all(layouts.pop(name) for name in llm) and [*layouts] == unified and second == third
    (drawn,) = {*layouts.values()}
    flow, streams, denoiser = own.flow, model.streams, model.denoiser
    headings = (
        f"`objective.native_fused` {fused} in tokenizer-1, then {third}.",
        f"`objective.latent_penalty` {float(penalty):.0e} (autoencoder).".replace("e-03", "e-3"),
        f"`objective.latent_noise` {noise}.", f"`objective.pixel` {pixel} (encoder).",
        f"`objective.edit_tags` {tags} (mllm stages).", f"`objective.balance` {balance} (unified stages).",
        f"`data.prompt_share` (mllm {prompts[0]}, mllm-2 and mllm-4 {prompts[1]}, mllm-3 {prompts[2]}).",
        f"`data.per_image` {per_image[0]} (mllm, mllm-3), {per_image[1]} (mllm-2, mllm-4).",
        f"`data.layouts` (mllm stages: true; unified-2, unified-3: {drawn:g}).",
        f"`model.denoiser.position_gain` {denoiser.position_gain:g}.",
        f'`model.denoiser.self_attention` "{denoiser.self_attention}".',
        f'`model.connector.reference` "{model.connector.reference}", `model.denoiser.reference_states` true.',
        f"`streams.pixel_layers` {streams.pixel_layers} of {SPAR_1B.streams.pixel_layers}.",
        f"`denoiser.align_depth` {denoiser.align_depth} of {denoiser.layers}.",
        f"`perceptual.autoencoder` {own.perceptual.autoencoder:g}, `lpips` and `convnext` {own.perceptual.lpips:g}.",
    )
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    bold = {" ".join(found.split()) for found in re.findall(r"^\*\*(.*?)\*\*", text, re.M | re.S)}
    assert {*headings} <= bold and flow.training_shift == flow.sampling_shift == 3
    section = " ".join(text.split("**`data.position_captions`")[1].split("**`data.prompt_share`")[0].split())
    assert f"{100 * float(placed):.0f} % of these captions name places" in section
    counts = Counter(stages["unified-2"].data.scene_kinds)
    words = {2: "twice", 3: "three times", 4: "four times"}
    shown = re.search(r"`(\w+)` scenes (.*?), `(\w+)` and `(\w+)` (.*?), `(\w+)` and `(\w+)` (.*?):", section).groups()
    named = {shown[0]: shown[1], shown[2]: shown[4], shown[3]: shown[4], shown[5]: shown[7], shown[6]: shown[7]}
    assert named == {kind: words[count] for kind, count in counts.items() if count > 1}


# Performance


def test_the_tables_of_performance_are_those_of_the_results():
    """If not: python docs/performance.py"""
    script = load("performance")
    text = script.DOCUMENT.read_text(encoding="utf-8")
    for mark, table in script.tables().items():
        assert text.split(f"<!-- {mark} -->\n")[1].split(f"<!-- end of {mark} -->")[0] == table
    assert script.PLOT.read_text(encoding="utf-8") == script.growth_plot()
    folder = ROOT / "benchmarks"
    recorded = runpy.run_path(str(folder / "all.py"))["RECORDED"]
    assert {*script.ROWS, "approximations"} <= {*recorded}
    assert all((folder / own[0]).is_file() for own in recorded.values())
    assert {path.stem for path in (folder / "results").glob("*.json")} <= {*recorded, "train_step_h200"}


# Reliability


def test_the_figures_of_reliability_are_those_of_the_last_run():
    """If not: python docs/reliability.py"""
    script = load("reliability")
    text = (ROOT / script.DOCUMENT).read_text(encoding="utf-8")
    assert text.split(script.MARKS[0])[1].split(script.MARKS[1])[0] == script.figures()
    assert not any(one["differing"] for one in script.read("kills")["rounds"])
    assert all(size["flat"] for size in script.read("soak")["sizes"].values())


def test_every_test_that_reliability_names_exists():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)`", text)
    assert len(named) > 10 and all((ROOT / path).is_file() for path in named)


# The site


def test_every_package_has_a_page_in_the_api_reference():
    packages = {path.parent.name for path in (ROOT / "src" / "spar").glob("*/__init__.py")}
    pages = {path.stem: path.read_text(encoding="utf-8").split()[1] for path in (ROOT / "docs" / "api").glob("*.md")}
    assert pages == {"spar": "spar", **{name: f"spar.{name}" for name in packages}}


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shown = (tmp_path / "api" / "inference.html").read_text(encoding="utf-8")
    assert 'id="spar.inference.pipeline.SparPipeline.generate"' in shown and "num_images_per_prompt" in shown
    pages = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert pages <= {path.name for path in tmp_path.glob("*.html")}
    outside = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?:")
    for page in tmp_path.rglob("*.html"):
        assert not outside.search(page.read_text(encoding="utf-8")), page


# Form


def documents() -> list[Path]:
    """The Markdown files, except the bundled weights' model card, which is generated and goes to the Hub."""
    folders = (path for path in ROOT.iterdir() if path.is_dir() and path.name in DOCUMENTED)
    return [*ROOT.glob("*.md"), *(path for folder in folders for path in folder.rglob("*.md"))]


def long_lines(text: str) -> list[int]:
    """Numbers of the lines over MAX_LINE characters, except rows of tables and lines with nothing but a URL."""
    lines = enumerate(text.splitlines(), 1)
    return [i for i, line in lines if len(line) > MAX_LINE and not line.startswith("|") and " " in line.strip("-* <>")]


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_line_of_a_document_is_over_120_characters(path):
    """Rows of tables are exempt, and what the log had before 28 November 2026; code blocks are not."""
    text = path.read_text(encoding="utf-8")
    found = long_lines(text)
    if path.name == "log.md":
        first_new = text[: text.index("\n- 2026-11-28.")].count("\n") + 2
        found = [number for number in found if number >= first_new]
    assert found == []


def test_a_long_line_would_be_found():
    words = "word " * 30
    assert long_lines(f"short\n{words}\n```\n{words}\n```\n| {words} |\nhttps://example.org/{'x' * 130}") == [2, 4]


def test_the_readme_is_short_and_begins_with_the_two_commands():
    assert len(README.splitlines()) <= MAX_README_LINES
    assert "make demo" in README[: README.index("## The four tasks")] and "make test" in README


def test_every_file_that_a_document_links_exists():
    for path in documents():
        text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
        for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text):
            target = "".join(link)
            if not target.startswith(("https://", "#")):
                assert (path.parent / target.split("#")[0]).exists(), f"{path.name}: {target}"


def test_images_are_small_files():
    images = list((ROOT / "docs" / "images").iterdir())
    assert len(images) >= 7
    for path in images:
        assert path.stat().st_size <= MAX_IMAGE_BYTES, path
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        else:
            Image.open(path).verify()


def test_the_readme_gives_the_words_and_forms_of_the_bundled_model():
    section = README.split("## What the bundled models know")[1].split("<!--")[0]
    known = set(known_words(load_model(BUNDLED).text_tokenizer))
    assert f"{len(known)} words" in section
    for label, words in {"Shapes": SHAPES, "Sizes": SIZES, "Colors": COLORS, "Backgrounds": BACKGROUNDS}.items():
        assert f"{label}: {', '.join(words)}." in section
    forms = re.findall(r"`([^`]+)`", section)
    assert len(forms) >= 14 and DESCRIBE in forms
    for form in forms:
        assert {word for word in split_words(form) if word.isalnum()} <= known, form
    for prompt in re.findall(r"`([^`]+)`", section.split("- Edits:")[0]):
        parse(prompt)


def test_the_chat_scores_and_the_minutes_in_the_guides_are_those_of_their_files():
    scores = json.loads((ROOT / "docs" / "results" / "shapes-chat.json").read_text())["scores"]
    found = {score["name"]: f"{score['value']:.3f}" for score in scores}
    said = re.search(r"\(Shapes-Chat\).*?\n\n", (ROOT / "docs" / "use.md").read_text("utf-8"), re.S)[0]
    assert re.findall(r"\d\.\d{3}", said) == [found[name] for name in ("turn_1", "turn_2", "overall", "part.alone")]
    stages = json.loads((BUNDLED / "manifest.json").read_text())["stages"]
    text = (ROOT / "docs" / "results.md").read_text("utf-8")
    assert f"for {sum(one['seconds'] for one in stages.values()) / 60:.0f} minutes" in text
    assert all(f"{one['steps']:,} " in text for one in stages.values())


# Examples


@pytest.mark.slow
def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, capsys):
    from spar.cli.main import main

    monkeypatch.chdir(tmp_path)
    section = README.split("## The four tasks")[1].split("\n## ")[0]
    (python,), (shell,) = (re.findall(rf"^```{kind}\n(.*?)^```", section, re.M | re.S) for kind in ("python", "sh"))
    names: dict = {}
    exec(compile(python, "README.md", "exec"), names)  # the repository's own text
    assert names["answer"] == "navy" and names["again"].size == (64, 64)
    for line in shell.splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    assert "navy" in capsys.readouterr().out
    # --weights dtype, the command line's default, changes nothing
    assert Image.open("out.png").tobytes() == names["out"].images[0].tobytes()


@pytest.mark.slow
def test_the_images_of_the_readme_are_the_bundled_models():
    """If not: python docs/images.py"""
    from spar import SparPipeline, load_pipeline

    script, dualtoken = load("images"), load_pipeline("dualtoken", dtype="float32")
    for name, image in script.make_images(SparPipeline.from_pretrained(), dualtoken).items():
        with Image.open(ROOT / "docs" / "images" / name) as kept:
            gap = np.asarray(kept.convert("RGB"), dtype=int) - np.asarray(image.convert("RGB"))
        assert np.abs(gap).mean() < 2, name  # of 255: other hardware rounds otherwise
        assert f"docs/images/{name}" in README
    for text in (script.PROMPT, script.INSTRUCTION, f"{script.QUESTION} *{script.ANSWER}*"):
        assert f"| {text} |" in README


@pytest.mark.slow
def test_the_examples_of_the_guide_to_use_run(tmp_path, monkeypatch, capsys):
    """Every block of docs/use.md, in order, in one folder and one namespace."""
    from spar.cli.main import main

    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / "use.md").read_text(encoding="utf-8"), re.M | re.S)
    assert {kind for kind, _ in blocks} == {"python", "sh"}
    names: dict = {}
    for kind, block in blocks:
        if kind == "python":
            exec(compile(block, "docs/use.md", "exec"), names)  # the repository's own text
        else:
            for line in block.splitlines():
                assert main(shlex.split(line)[1:]) == 0, line
    output = capsys.readouterr().out
    for promised in re.findall(r"print\(\w+\)  # (.*)", "".join(block for _, block in blocks)):
        assert promised in output
    gap = np.abs(np.asarray(names["again"].images[0]).astype(int) - np.asarray(names["out"].images[1]))
    assert gap.mean() < 1 and names["steps"] == [(1, 8), (2, 8)]  # in bfloat16 single pixels move by more
    assert names["first"] == "navy" and names["second"] and names["answer"].finish_reason == "stop"
    assert names["back"].shape == names["pixels"].shape
    assert (tmp_path / "model" / "README.md").is_file() and "would go to OWNER/NAME, private" in output


@pytest.mark.slow
def test_the_recipe_file_of_the_guide_to_training_trains_by_its_command(tmp_path, monkeypatch):
    """From the bundled model, on images with captions; one step of two."""
    from spar.cli.main import main

    monkeypatch.chdir(tmp_path)
    guide = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    text, line = re.search(r"^```yaml\n(.*?)^```\n\n```\nspar (.*?)\n```", guide, re.M | re.S).groups()
    Path("own.yaml").write_text(text)
    Path("DATA").mkdir()
    lines = []
    for index in range(4):
        scene = scene_at("validation", index)
        Image.fromarray(render(scene)).save(f"DATA/{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": caption(scene, np.random.default_rng(index))}))
    Path("DATA/metadata.jsonl").write_text("\n".join(lines))
    short = [word for name, value in (("steps", 1), ("batch", 2), ("warmup", 1))
             for word in (f"--stages.unified-2.{name}", str(value))]  # fmt: skip
    words = ["spar" if word == "MODEL" else word for word in shlex.split(line)]
    assert main([*words, *short, "--data.workers", "0"]) == 0
    resolved = json.loads(Path("runs/file/recipe.json").read_text())
    assert (resolved["seed"], resolved["model"]["router"]["kind"]) == (3, "last")
    assert Path("runs/file/unified-2/done").is_dir()


def test_measured_numbers_in_the_guides_are_those_of_the_benchmarks():
    folder = ROOT / "benchmarks" / "results"
    training, serving = ((ROOT / "docs" / name).read_text() for name in ("training.md", "serving.md"))
    runs = json.loads((folder / "train_step_h200.json").read_text())
    shown = re.findall(r"^\| (\S+), \d+ px \| (\d+) \| (yes|no) \| (\S+) \| (\S+) \| (\S+) \|$", training, re.M)
    measured = {
        (row["stage"], str(row["batch"]), "yes" if run["compile"] else "no", f"{row['images_per_second']:.1f}",
         f"{row['mfu']:.2f}", f"{row['peak_memory_gib']:.1f}")
        for run in runs for row in run["results"]
    }  # fmt: skip
    assert len(shown) == 3 and set(shown) <= measured
    load = json.loads((folder / "serve_load.json").read_text())
    flat = " ".join(serving.split())
    shown = re.search(r"takes (\S+) seconds; .* gets (\S+) images a second, eight together (\S+)\s", flat)
    assert shown.groups() == (
        f"{load['first_image_s']:.1f}", f"{load['one']['images_per_s']:.1f}", f"{load['eight']['images_per_s']:.1f}"
    )
