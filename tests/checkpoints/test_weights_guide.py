"""docs/weights.md is true: its commands run, in order and in one folder, on tiny random checkpoints of its formats.

The commands are the document's own, with the published names: the Hub is a cache with tiny repositories of these names,
and the local folders and UniLIP's file are tiny too. The recipes are the full-size ones, and take the checkpoints'
sizes, as they do at full size.
"""

import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import InternVLForConditionalGeneration

from spar.checkpoints.spar_format import ModelBundle, load_model
from spar.cli.main import main
from spar.recipes import recipe

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
COMMANDS = "".join(re.findall(r"^```\w*\n(.*?)^```", GUIDE, re.M | re.S)).replace("\\\n ", "").splitlines()

MLLM, AUTOENCODER = "OpenGVLab/InternVL3-1B-hf", "mit-han-lab/dc-ae-f32c32-sana-1.1-diffusers"
DIT, UNILIP = "Efficient-Large-Model/Sana_600M_512px_diffusers", "kanashi6/UniLIP-1B"
COMMITS = {MLLM: "a" * 40, AUTOENCODER: "b" * 40, DIT: "c" * 40, UNILIP: "d" * 40}
EARLIER = "e" * 40  # another commit of MLLM, with other weights
LAYERS = {"1B": (6, 6), "3B": (8, 7)}  # of the LLM and the DiT: at least as many as the recipes copy and align
SHIFTS = {"1B": 2.5, "3B": 2.0}  # of the DiT's own scheduler; the recipes' is 3

# A reader's own things, sizes that the tiny models lack, and what keeps a training short and an image the same.
REPLACED = {"MODEL": "spar-1b", "DATA": "photos"}
SIZES = {"--height 896 --width 896 --decode-tile 16": "--height 224 --width 224 --decode-tile 4"}  # of 112, not of 448
ADDED = {
    "train": "--stages.unified-2.steps 2 --stages.unified-2.batch 2 --stages.unified-2.warmup 1 --alignment.hidden 8 "
    "--data.workers 0",
    "generate": "--seed 0 --dtype bfloat16",
}

# What not every machine has, a GPU and torchao: a command that needs it is refused elsewhere, and for this reason.
NEEDS = {
    "--offload --device cuda": (torch.cuda.is_available(), "device: expected one that is here, got 'cuda'"),
    "--weights int8": (importlib.util.find_spec("torchao") is not None, "weights int8 needs torchao: pip install"),
}


@dataclass(frozen=True)
class Ran:
    """A command after it ran."""

    status: int
    out: str
    err: str


def spar(*words: str) -> Ran:
    """Run a command in the working folder."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*words])
    return Ran(status, out.getvalue(), err.getvalue())


def words_of(command: str) -> list[str]:
    """The words of a command of the document after `spar`, at this size."""
    for own, small in SIZES.items():
        command = command.replace(own, small)
    program, *words = (REPLACED.get(word, word) for word in shlex.split(command, comments=True))
    assert program == "spar"
    return [*words, *ADDED.get(words[0], "").split()]


def command(beginning: str) -> str:
    """The document's one command that begins so."""
    (found,) = (one for one in COMMANDS if one.startswith(beginning))
    return found


TILED = command('spar generate "a red circle" --model MODEL --height')


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def publish(folder: Path, hub: Path, name: str, commit: str, *, newest: bool = True) -> None:
    """Copy a folder into a cache of the Hub, as snapshot_download leaves it."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    if newest:
        (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)


def write_checkpoints(folder: Path, hub: Path, written: Path) -> None:
    """The local folders and the file that the document names, and the repositories; `written` is for the way there."""
    foreign = load(ROOT / "tests" / "checkpoints" / "foreign.py")
    unilip = load(ROOT / "tests" / "checkpoints" / "test_from_unilip.py")
    (layers, blocks), (more_layers, more_blocks) = LAYERS["1B"], LAYERS["3B"]
    large = folder / "InternVL3-2B"
    foreign.save_original(foreign.mllm(layers=more_layers, tied=False).to(torch.bfloat16), large)
    (large / "modeling_internvl_chat.py").write_text("open('code of a checkpoint was run', 'w')\n")
    foreign.save_dit(foreign.dit(layers=more_blocks), folder / "Sana_1600M_512px_diffusers", shift=SHIFTS["3B"])
    foreign.mllm = functools.partial(foreign.mllm, layers=layers)
    foreign.dit = functools.partial(foreign.dit, layers=blocks)
    foreign.save_hf(foreign.mllm(), folder / "InternVL3-1B-hf")
    foreign.autoencoder().save_pretrained(folder / "dc-ae")
    foreign.save_dit(foreign.dit(), folder / "Sana_600M_512px_diffusers", shift=SHIFTS["1B"])
    unilip.write_published(foreign, written, unilip.Original(foreign, foreign.randomize(foreign.mllm(), seed=9)))
    foreign.edit_json(written / "model" / "config.json", mllm_hf_path=MLLM, vae_path=AUTOENCODER, dit_path=DIT)
    shutil.move(written / "tokenizer.pth", folder / "1b_unilip.pth")
    foreign.save_hf(foreign.randomize(foreign.mllm(), seed=4), written / "earlier")
    publish(written / "earlier", hub, MLLM, EARLIER, newest=False)
    publish(folder / "InternVL3-1B-hf", hub, MLLM, COMMITS[MLLM])
    publish(folder / "dc-ae", hub, AUTOENCODER, COMMITS[AUTOENCODER])
    publish(folder / "Sana_600M_512px_diffusers", hub, DIT, COMMITS[DIT])
    publish(written / "model", hub, UNILIP, COMMITS[UNILIP])


@pytest.fixture(scope="module")
def asked() -> dict[str, list[str]]:
    """Of each repository that was looked for, the names of the files that were."""
    return {}


@pytest.fixture(scope="module")
def place(tmp_path_factory, asked, write_captioned) -> Iterator[Path]:
    """The working folder with what a reader of the document has there, offline."""
    root = tmp_path_factory.mktemp("weights")
    folder, hub = root / "work", root / "hub"
    folder.mkdir()
    write_checkpoints(folder, hub, root / "written")
    write_captioned(folder / REPLACED["DATA"], 8)
    download = huggingface_hub.snapshot_download

    def snapshot_download(repository: str, **keywords) -> str:
        asked.setdefault(repository, []).extend(keywords["allow_patterns"])
        return download(repository, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        yield folder


@pytest.fixture(scope="module")
def ran(place) -> dict[str, Ran]:
    """Every command of the document, run in order. Each image has a file of its own, image-0.png and so on."""
    found: dict[str, Ran] = {}
    for one in COMMANDS:
        words = words_of(one)
        found[one] = spar(*words, *(["-o", f"image-{len(found)}.png"] if words[0] == "generate" else []))
    return found


def manifest(folder: str) -> dict:
    return json.loads(Path(folder, "manifest.json").read_text())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder, by file and name."""
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)} {key}": value for file in files for key, value in load_file(file).items()}


def same(own: dict[str, torch.Tensor], other: dict[str, torch.Tensor], beginning: str = "") -> bool:
    """Whether tensors are equal to the bit, and the same ones, of those whose names begin so."""
    chosen = [{key: value for key, value in one.items() if key.startswith(beginning)} for one in (own, other)]
    assert chosen[0]
    return chosen[0].keys() == chosen[1].keys() and all(torch.equal(v, chosen[1][key]) for key, v in chosen[0].items())


def state(bundle: ModelBundle) -> dict[str, torch.Tensor]:
    return bundle.model.state_dict()


def test_every_command_runs(ran):
    """Or is refused for what the machine lacks, which only the commands of NEEDS may be."""
    assert len(ran) == len(COMMANDS) == 9
    for flags in NEEDS:
        assert sum(flags in one for one in ran) == 1
    for one, done in ran.items():
        here, refusal = next((need for flags, need in NEEDS.items() if flags in one), (True, ""))
        assert done.status == (0 if here else 2), f"{one}: {done.err}"
        assert here or refusal in done.err
    assert not Path("code of a checkpoint was run").exists()


@pytest.mark.parametrize("size", ["1B", "3B"])
def test_a_built_model_has_the_parts_and_says_where_they_are_from(ran, size):
    name = f"spar-{size.lower()}"
    bundle, said = load_model(Path(name)), manifest(name)
    config = bundle.model.config
    assert (config.text.layers, config.denoiser.layers) == LAYERS[size]
    assert bundle.sampling.shift == SHIFTS[size]
    assert float(bundle.model.tokenizer.latent_scale) == pytest.approx(0.41407)  # the autoencoder's scaling_factor
    assert Path(name, "pixel_encoder").is_dir()
    random = {part for part, origin in said["parts"].items() if origin.startswith("random weights of seed 0")}
    names = ("semantic_stream", "pixel_stream", "fusion")
    assert random == {*(f"tokenizer.{one}" for one in names), "router", "connector"}
    brought = {"tokenizer.encoder": "mllm", "language": "mllm", "tokenizer.decoder": "autoencoder"}
    brought |= {"pixel_encoder": "autoencoder", "denoiser.network": "dit"}
    assert brought.items() <= said["parts"].items() and "alignment head" in said["parts"]
    last = bundle.model.language.network.layers[-len(bundle.model.connector.layers) :]
    for own, source in zip(bundle.model.connector.layers, last, strict=True):
        assert all(torch.equal(value, source.state_dict()[key]) for key, value in own.state_dict().items())
    notes = ran[command(f"spar build {name} ")].err
    full = recipe(name).model
    for part, wanted, own in (("text", full.text, config.text), ("denoiser", full.denoiser, config.denoiser)):
        assert f"model.{part}.layers: the recipe expects {wanted.layers}, the checkpoint has {own.layers}\n" in notes


def test_a_manifest_has_commits_of_the_hub_and_hashes_of_local_files(ran):
    parts = {"mllm": MLLM, "autoencoder": AUTOENCODER, "dit": DIT}
    found = manifest("spar-1b")["sources"]
    assert {part: (one["source"], one["commit"]) for part, one in found.items()} == {
        part: (name, COMMITS[name]) for part, name in parts.items()
    }
    folders = {"mllm": "InternVL3-2B", "autoencoder": "dc-ae", "dit": "Sana_1600M_512px_diffusers"}
    found = manifest("spar-3b")["sources"]
    assert {part: record["source"] for part, record in found.items()} == folders
    for part, name in folders.items():
        weights = {str(path.relative_to(name)) for path in Path(name).rglob("*.safetensors")}
        digests = {path: hashlib.sha256(Path(name, path).read_bytes()).hexdigest() for path in found[part]["sha256"]}
        assert found[part] == {"source": name, "sha256": digests} and weights < digests.keys()


def test_weights_keep_their_stored_type(ran):
    """That of InternVL3-2B is bfloat16 here, that of the others float32."""
    types = {key.split()[0]: value.dtype for key, value in tensors(Path("spar-3b/language")).items()}
    assert set(types.values()) == {torch.bfloat16}
    assert {value.dtype for value in tensors(Path("spar-3b/denoiser")).values()} == {torch.float32}
    assert {value.dtype for value in tensors(Path("spar-1b/language")).values()} == {torch.float32}


def test_a_revision_pins_a_commit(ran):
    words = words_of(command("spar build spar-1b "))[:-1]
    assert spar(*words, "pinned", "--revision", f"mllm={EARLIER}").status == 0
    assert manifest("pinned")["sources"]["mllm"]["commit"] == EARLIER
    own, other = tensors(Path("spar-1b")), tensors(Path("pinned"))
    assert same(own, other, "denoiser/") and not same(own, other, "language/")


def test_of_a_repository_only_json_safetensors_and_tokenizer_files_are_fetched(ran, asked):
    assert asked.keys() == COMMITS.keys()
    for patterns in asked.values():
        for name in ("modeling.py", "code/run.py", "pytorch_model.bin", "model.pth", "model.pt", "a.ckpt", "a.pkl"):
            assert not any(fnmatch(name, pattern) for pattern in patterns)
    for name in ("config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "vocab.json", "merges.txt"):
        assert any(fnmatch(name, pattern) for pattern in asked[MLLM])


def test_a_built_folder_begins_the_tokenizer_and_no_unified_stage(ran):
    begins = ("train", "spar-1b", "--init-from", "spar-1b", "--dry-run", "--run", "runs/begin")
    done = spar(*begins)
    assert done.status == 0 and "tokenizer-1" in done.out
    done = spar(*begins, "--stage", "unified-1")
    assert done.status == 2 and "train the tokenizer" in done.err


def test_unilips_model_becomes_what_the_table_says(ran):
    said, bundle = manifest("unilip-1b"), load_model(Path("unilip-1b"))
    config, tokenizer = bundle.model.config, bundle.model.tokenizer
    brought = ["tokenizer.encoder", "tokenizer.semantic_stream", "tokenizer.decoder", "language", "connector"]
    assert {said["parts"][part] for part in (*brought, "denoiser.network", "latent scale")} == {"unilip"}
    assert said["parts"]["tokenizer.pixel_stream"] == "random weights of seed 0"
    assert (config.streams.fusion, config.streams.block_norm_eps) == ("residual", 1e-6)
    assert (config.router.kind, config.router.scale, config.router.norm) == ("dtr", "last", False)
    assert torch.equal(bundle.model.router.projection.weight, torch.eye(config.text.hidden_size))
    assert (config.connector.reference_scale, config.connector.image_start) == ("raw", True)
    assert float(tokenizer.latent_scale) == pytest.approx(10.6)
    pixels = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = tokenizer.encode(pixels)
    assert torch.equal(latents.z_f.flatten(2).transpose(1, 2), latents.z_s) and latents.z_p.std() > 0
    assert not same(tensors(Path("unilip-1b")), tensors(Path("spar-1b")), "language/")  # UniLIP's own, not InternVL3's
    exact = spar(*words_of(command("spar convert unilip kanashi6"))[:-1], "exact", "--router", "last")
    assert exact.status == 0 and load_model(Path("exact")).model.config.router.kind == "last"


def test_unilips_tokenizer_becomes_one_beside_published_parts(ran):
    parts = manifest("unilip-tokenizer")["parts"]
    assert parts["language"] == "mllm" and parts["denoiser.network"] == "dit" and parts["latent scale"] == "unilip"
    own, other = tensors(Path("unilip-tokenizer")), tensors(Path("unilip-1b"))
    assert same(own, other, "tokenizer/")  # both of one UniLIP, with one factor
    assert same(own, tensors(Path("spar-1b")), "language/")
    factor = words_of(command("spar convert unilip 1b_unilip.pth"))[:-1]
    where = factor.index("--factor")
    done = spar(*factor[:where], *factor[where + 2 :], "without-factor")
    assert done.status == 2 and "factor: expected the scale of UniLIP's latent" in done.err


def test_training_from_a_converted_folder_takes_its_sizes_and_forms(ran):
    resolved = json.loads(Path("runs/warm/recipe.json").read_text())
    assert resolved["name"] == "spar-1b" and resolved["model"]["streams"]["fusion"] == "residual"
    assert resolved["model"] == json.loads(Path("unilip-1b/config.json").read_text())["model"]
    before = state(load_model(Path("unilip-1b")))
    after = load_file(Path("runs/warm/unified-2/done/modules.safetensors"))
    moved = {key.split(".")[0] for key, value in before.items() if not torch.equal(after[f"model.{key}"], value)}
    assert moved == {"router", "connector", "denoiser"}
    assert not Path("runs/warm/model").exists()  # which the last stage writes
    assert recipe("spar-1b").stages[-1].name == "unified-3"


def test_what_is_exported_is_read_by_transformers_and_by_us(ran):
    own = state(load_model(Path("spar-1b")))
    names = {"config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json", "spar-export.json"}
    assert names <= {path.name for path in Path("internvl-tuned").iterdir()}
    library = InternVLForConditionalGeneration.from_pretrained("internvl-tuned").model
    assert library.dtype == torch.bfloat16
    places = {"tokenizer.encoder.vision_tower.": library.vision_tower, "language.network.": library.language_model}
    for beginning, part in places.items():
        assert all(torch.equal(v, own[f"{beginning}{key}"].bfloat16()) for key, v in part.state_dict().items())
    words = words_of(command("spar export internvl "))
    assert spar(*words).status == 2 and spar(*words, "--overwrite").status == 0
    shutil.copytree("photos", "others")
    assert spar(*words[:3], "-o", "others", "--overwrite").status == 2 and Path("others/metadata.jsonl").is_file()
    assert spar(*words[:3], "-o", "in-float32").status == 0
    again = words_of(command("spar build spar-1b "))[:-1]
    again[again.index(MLLM)] = "./in-float32"
    assert spar(*again, "again").status == 0
    assert same(tensors(Path("spar-1b")), tensors(Path("again")), "language/")
    assert same(own, state(load_model(Path("again"))), "tokenizer.encoder.")


def pixels_of(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def whole_image(*words: str) -> np.ndarray:
    """The image of the document's command with tiles, without them and with these words."""
    drawn = words_of(TILED)
    at = drawn.index("--decode-tile")
    path = "-".join(["whole", *words]) + ".png"
    assert spar(*drawn[:at], *drawn[at + 2 :], *words, "-o", path).status == 0
    return pixels_of(path)


def test_tiles_change_an_image_slightly(ran):
    whole, tiled = whole_image(), pixels_of(f"image-{COMMANDS.index(TILED)}.png")
    assert 0 < np.abs(whole - tiled).mean() < whole.std() / 3  # of images that have nothing in common it is as large


def test_weights_in_the_type_of_the_products_change_nothing(ran):
    assert np.array_equal(whole_image("--weights", "dtype"), whole_image("--weights", "float32"))


def test_spar_info_reads_every_folder(ran):
    for name, used in (("spar-1b", "spar-1b"), ("spar-3b", "spar-3b"), ("unilip-1b", "spar-1b")):
        done = spar("info", name, "--json")
        assert done.status == 0 and json.loads(done.out)["manifest"]["recipe"] == used
