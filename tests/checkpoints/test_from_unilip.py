"""`spar convert unilip`: a checkpoint in UniLIP's public format computes in SPAR what it computed before.

`Original` is UniLIP's forward pass from its description, on the libraries' own classes, with none of our code.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Qwen2Model

from spar.checkpoints.formats.torch_pickle import TorchPickleReader
from spar.checkpoints.from_published import SOURCES
from spar.checkpoints.from_unilip import PICKED, convert_unilip
from spar.checkpoints.spar_format import ModelBundle, SamplingConfig, load_model, save_model
from spar.cli.main import main
from spar.common.errors import InputError
from spar.inference.pipeline import SparPipeline
from spar.models.config import RouterConfig, SparConfig, TextConfig
from spar.models.router import normalize_hidden_states
from spar.recipes import recipe
from spar.training.initial_weights import load_initial_weights
from spar.training.modules import TrainingModules

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
QUERIES, CONNECTOR_LAYERS, FACTOR, IMAGE = 6, 2, 10.6, 5
PAPER = recipe("spar-1b").model
CONFIG = SparConfig(
    text=TextConfig(layers=4, hidden_size=32, heads=4, kv_heads=2),
    streams=replace(PAPER.streams, pixel_layers=1, pixel_heads=2),
    router=RouterConfig(count=4),
    # Among these are forms that UniLIP does not have, and that a conversion must not take over.
    connector=replace(PAPER.connector, queries=3, layers=2, reference="added"),
    denoiser=replace(PAPER.denoiser, layers=2, align_depth=2, self_attention="softmax", reference_states=True),
)


class ResidualMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        layers = (nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.mlp = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


class VaeDecoder(nn.Module):
    """One stream from visual tokens to DC-AE's latents, and its decoder."""

    def __init__(self, width: int, channels: int, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder
        self.down_blocks = nn.ModuleList(ResidualMlp(width) for _ in range(3))
        self.down_mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, channels), nn.GELU(), nn.Linear(channels, channels)
        )


class Original(nn.Module):
    def __init__(self, foreign, mllm: nn.Module | None = None) -> None:
        super().__init__()
        self.mllm = mllm or foreign.mllm()
        self.image = self.mllm.config.image_token_id
        text = self.mllm.config.text_config
        short = type(text)(**{**text.to_dict(), "num_hidden_layers": CONNECTOR_LAYERS, "layer_types": None})
        short._attn_implementation = "eager"
        width = text.hidden_size
        self.llm_connector = foreign.randomize(Qwen2Model(short), seed=5)
        del self.llm_connector.embed_tokens
        self.latent_queries = nn.Parameter(draw(1, QUERIES, width, seed=6))
        self.projector = foreign.randomize(nn.Linear(width, foreign.CAPTION), seed=7)
        self.dit = foreign.dit()
        decoder = foreign.autoencoder().decoder
        self.vae_decoder = foreign.randomize(VaeDecoder(width, foreign.CHANNELS, decoder), seed=8)
        self.eval().requires_grad_(False)

    def features(self, pixels: Tensor) -> Tensor:
        """`[B, 3, H, W]` in [0, 1] to projected tokens `[B, N, D]`; an image may be oblong."""
        hidden = self.mllm.model.vision_tower((pixels - MEAN) / STD).last_hidden_state[:, 1:]
        rows, columns = (side // 14 for side in pixels.shape[-2:])
        hidden = hidden.reshape(len(pixels), rows // 2, 2, columns // 2, 2, -1).transpose(2, 3)
        return self.mllm.model.multi_modal_projector(hidden.reshape(len(pixels), rows * columns // 4, -1))

    def encode(self, pixels: Tensor) -> Tensor:
        """Images to latents as the DiT sees them."""
        x = self.features(pixels)
        for block in self.vae_decoder.down_blocks:
            x = block(x)
        rows, columns = (side // 28 for side in pixels.shape[-2:])
        return FACTOR * self.vae_decoder.down_mlp(x).transpose(1, 2).reshape(len(pixels), -1, rows, columns)

    def decode(self, latent: Tensor) -> Tensor:
        """Latents to images in [0, 1], of 28 pixels a cell, not clamped."""
        picture = self.vae_decoder.decoder(latent / FACTOR)
        size = tuple(side * 28 for side in latent.shape[-2:])
        return (F.interpolate(picture, size=size, mode="bilinear", align_corners=False) + 1) / 2

    def condition(self, ids: Tensor, mask: Tensor, pixels: Tensor | None = None) -> Tensor:
        embeddings = self.mllm.model.language_model.embed_tokens(ids).clone()
        image = ids == self.image
        if pixels is not None:
            embeddings[image] = self.features(pixels).flatten(0, 1)
        embeddings = torch.cat([embeddings, self.latent_queries.repeat(len(ids), 1, 1)], dim=1)
        mask = F.pad(mask, (0, QUERIES), value=1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        hidden = self.mllm.model.language_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=places
        ).last_hidden_state
        if pixels is not None:
            hidden[F.pad(image, (0, QUERIES))] = self.features(pixels).flatten(0, 1)
        both = (1 - (mask[:, :, None] * mask[:, None, :]).float())[:, None] * -100000
        hidden = self.llm_connector(inputs_embeds=hidden, attention_mask=both, position_ids=places).last_hidden_state
        return self.projector(hidden)

    def velocity(self, latent: Tensor, time: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        mask = F.pad(mask, (0, QUERIES), value=1)
        return self.dit(
            latent, timestep=1000 * time, encoder_hidden_states=condition, encoder_attention_mask=mask
        ).sample


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int = 112, width: int = 112, count: int = 1) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def named(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value.clone() for key, value in module.state_dict().items()}


def model_tensors(original: Original, foreign) -> dict[str, Tensor]:
    """A model checkpoint: everything under `model.`, tower and projector in InternVL's original layout."""
    inner = original.mllm.model
    vision = foreign.original_vision(inner.vision_tower.state_dict())
    tensors = {f"model.vision_tower.{k}": v for k, v in vision.items()}
    projector = foreign.original_projector(inner.multi_modal_projector.state_dict())
    tensors |= {f"model.multi_modal_projector.{k}": v for k, v in projector.items()}
    tensors |= named(inner.language_model, "model.language_model")
    tensors["lm_head.weight"] = original.mllm.lm_head.weight.clone()
    tensors["model.latent_queries"] = original.latent_queries.clone()
    for part in ("llm_connector", "projector", "dit", "vae_decoder"):
        tensors |= named(getattr(original, part), f"model.{part}")
    return tensors


def tokenizer_tensors(original: Original, foreign) -> dict[str, Tensor]:
    inner = original.mllm.model
    tensors = {f"encoder.{k}": v for k, v in foreign.original_vision(inner.vision_tower.state_dict()).items()}
    projector = foreign.original_projector(inner.multi_modal_projector.state_dict())
    tensors |= {f"mlp1.{k}": v for k, v in projector.items()}
    return tensors | {key: value.clone() for key, value in original.vae_decoder.state_dict().items()}


def as_saved_by_older_transformers(key: str) -> str:
    """What of a model has names of its own is saved under them, the rest under `model.`."""
    key = key.replace("model.language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head")
    return key.removeprefix("model.") if key.startswith(("model.vision_tower", "model.multi_modal")) else key


@pytest.fixture(scope="module")
def original(foreign) -> Original:
    return Original(foreign)


@pytest.fixture(scope="module")
def published(foreign, original, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("unilip")
    write_published(foreign, root, original)
    return root


def write_published(foreign, root: Path, original: Original | None = None) -> None:
    """The parts that UniLIP is made from, a model and a tokenizer of UniLIP."""
    original = original or Original(foreign)
    foreign.save_hf(original.mllm, root / "mllm")
    foreign.autoencoder().save_pretrained(root / "autoencoder")
    foreign.save_dit(foreign.dit(), root / "dit")
    (root / "model").mkdir()
    save_file(model_tensors(original, foreign), root / "model" / "model.safetensors")
    own = {
        "model_type": "unilip_internvl", "n_query": QUERIES, "connect_layer": CONNECTOR_LAYERS,
        "unilip_factor": FACTOR, "mllm_path": "OpenGVLab/InternVL3-1B", "mllm_hf_path": str(root / "mllm"),
        "vae_path": str(root / "autoencoder"), "dit_path": str(root / "dit"),
    }  # fmt: skip
    config = json.loads((root / "mllm" / "config.json").read_text()) | own
    (root / "model" / "config.json").write_text(json.dumps(config))
    torch.save(tokenizer_tensors(original, foreign), root / "tokenizer.pth")


def convert(root: Path, what: str = "model", **keywords) -> ModelBundle:
    sources = {name: None if what == "model" else str(root / name) for name in SOURCES}
    return convert_unilip(str(root / what), CONFIG, SamplingConfig(shift=3.0), sources, **keywords)


@pytest.fixture(scope="module", params=["last", "dtr"])
def converted(request, published) -> ModelBundle:
    return convert(published, router=request.param)


@pytest.fixture(scope="module")
def exact(published) -> ModelBundle:
    return convert(published, router="last")


def is_exact(converted: ModelBundle) -> bool:
    return converted.model.config.router.kind == "last"


def near(own: Tensor, wanted: Tensor, *, exact: bool) -> None:
    """Equal up to the order of float32 sums, or within a thousandth of the values' own size."""
    size = float(wanted.std())
    torch.testing.assert_close(own, wanted, rtol=1e-4 if exact else 0, atol=(1e-5 if exact else 1e-3) * size)


PROMPTS = torch.tensor([[0, 0, 1, 50, 60, 70, 3], [1, 40, 41, 42, 43, 44, 3]])
REFERENCE = torch.tensor([[0, 0, 3, *[IMAGE] * 16, 4, 50, 3], [1, 40, 3, *[IMAGE] * 16, 4, 43, 3]])


# ---- the same function -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(112, 112), (56, 140)])
def test_an_image_has_the_same_latent_and_the_latent_the_same_image(converted, original, size):
    tokenizer, pixels = converted.model.tokenizer, picture(*size)
    latents = tokenizer.encode(pixels)
    assert torch.equal(latents.z_f, latents.z_s.transpose(1, 2).unflatten(2, latents.z_f.shape[-2:]))
    assert latents.z_p.std() > 0  # the pixel stream is there, and not yet heard
    near(tokenizer.normalize(latents.z_f), original.encode(pixels), exact=True)
    latent = draw(1, 8, *(side // 28 for side in size))
    near(tokenizer.decode(tokenizer.denormalize(latent)), original.decode(latent), exact=True)


@pytest.mark.parametrize("edit", [False, True], ids=["generate", "edit"])
def test_a_prompt_gives_the_same_condition_and_velocity(converted, original, edit):
    model, ids = converted.model, REFERENCE if edit else PROMPTS
    mask, pixels = (ids != 0).long(), picture(count=2) if edit else None
    own = model.condition(ids, mask, model.tokenizer.encoder(pixels) if edit else None)
    wanted = original.condition(ids, mask, pixels)
    real = own.mask.bool()
    near(own.states[real], wanted[real], exact=is_exact(converted))
    latent, time = draw(2, 8, 4, 4, seed=1), torch.tensor([0.3, 0.8])
    velocity = original.velocity(latent, time, wanted, mask)
    near(model.velocity(latent, time, own).velocity, velocity, exact=is_exact(converted))


def test_the_last_layer_router_hands_on_the_very_state(exact):
    model = exact.model
    states = [draw(2, 5, 32, seed=seed) * 10.0**seed for seed in range(4)]
    routed = model.router(normalize_hidden_states(states, model.config.router.scale))
    assert torch.equal(routed.states, states[-1])


def test_a_dtr_that_picks_the_last_layer_can_still_learn(published):
    model = convert(published).model
    assert model.config.router == RouterConfig(kind="dtr", count=4, scale="last", norm=False)
    model.router.requires_grad_(True)
    condition = model.condition(PROMPTS, (PROMPTS != 0).long())
    torch.testing.assert_close(condition.weights[..., :3], torch.full_like(condition.weights[..., :3], PICKED))
    condition.states.square().mean().backward()
    gradients = {name: float(p.grad.abs().max()) for name, p in model.router.named_parameters() if p.grad is not None}
    assert min(gradients["gate.2.weight"], gradients["gate.2.bias"], gradients["alpha"]) > 0


def test_it_answers_as_it_did(exact, original):
    """Understanding: the LLM with UniLIP's encoder, against the library's own generation."""
    model, pixels = exact.model, picture()
    ids = torch.tensor([[3, *[IMAGE] * 16, 4, 50, 60]])
    wanted = original.mllm.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=(pixels - MEAN) / STD, do_sample=False,
        max_new_tokens=5, eos_token_id=-1,
    )[0, ids.shape[1] :].tolist()
    answer = model.understand(ids, torch.ones_like(ids), model.tokenizer.encoder(pixels), max_new_tokens=5)[0]
    end = model.config.text.eos_token_id
    assert answer == (wanted[: wanted.index(end)] if end in wanted else wanted) and wanted


# ---- what is read, and where it goes ---------------------------------------------------------------------------------


def test_the_forms_are_unilips_and_the_prompt_is_too(exact):
    config = exact.model.config
    assert (config.connector.queries, config.connector.layers) == (QUERIES, CONNECTOR_LAYERS)
    assert config.connector.image_start and config.connector.reference_scale == "raw"
    assert (config.streams.fusion, config.streams.residual_blocks) == ("residual", 3)
    assert config.streams.block_norm_eps == 1e-6
    assert not config.denoiser.reference_latent and config.denoiser.position_gain == 0
    assert not config.denoiser.reference_states and config.connector.reference == "replaced"
    assert config.denoiser.self_attention == "linear"
    assert float(exact.model.tokenizer.latent_scale) == pytest.approx(FACTOR)
    assert exact.sampling.shift == 3.0


def test_the_manifest_tells_what_came_from_where(exact):
    parts = exact.manifest["parts"]
    assert parts["connector"] == parts["language"] == parts["denoiser.network"] == "unilip"
    assert parts["tokenizer.pixel_stream"] == "random weights of seed 0"
    assert parts["tokenizer.fusion"].startswith("passes the semantic stream on")
    assert parts["router"] == "passes the last layer on (last)" and parts["pixel_encoder"] == "autoencoder"


@pytest.mark.parametrize("what", ["model", "tokenizer.pth"])
def test_the_manifest_names_every_file_that_was_read_and_no_other(published, opened, what):
    with opened(published) as names:
        sources = convert(published, what, factor=FACTOR).manifest["sources"]
    places = {"mllm": "mllm/", "autoencoder": "autoencoder/", "dit": "dit/", "unilip": ""}
    places["unilip"] = "model/" if what == "model" else ""
    assert {f"{places[name]}{file}" for name, record in sources.items() for file in record["sha256"]} == names
    own = {"model/config.json", "model/model.safetensors"} if what == "model" else {"tokenizer.pth"}
    assert own | {"mllm/config.json", "dit/scheduler/scheduler_config.json"} < names
    assert ("mllm/model.safetensors" in names) == (what != "model")


@pytest.mark.parametrize("what", ["model", "tokenizer.pth"])
def test_of_its_parts_on_the_hub_only_the_weights_that_are_read_are_fetched(published, monkeypatch, what):
    asked = {}

    def snapshot_download(repository: str, *, allow_patterns: list[str], **_) -> str:
        asked[repository] = any(pattern.endswith(".safetensors") for pattern in allow_patterns)
        return str(published / repository.partition("/")[2])

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    sources = {name: f"someone/{name}" for name in SOURCES}
    convert_unilip(str(published / what), CONFIG, SamplingConfig(), sources, factor=FACTOR)
    needed = {"autoencoder"} if what == "model" else set(SOURCES)
    assert asked == {f"someone/{name}": name in needed for name in SOURCES}


def test_the_names_of_older_transformers_give_the_same_model(foreign, exact, original, published, tmp_path):
    tensors = {as_saved_by_older_transformers(key): value for key, value in model_tensors(original, foreign).items()}
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_bytes((published / "model" / "config.json").read_bytes())
    other = convert(tmp_path, router="last").model.state_dict()
    assert all(torch.equal(value, other[key]) for key, value in exact.model.state_dict().items())


def test_its_vocabulary_and_its_head_are_read_from_its_weights(foreign, original, published, tmp_path):
    """UniLIP adds three tokens to InternVL3's, and its head is its own, though its configuration says 192 and tied."""
    tensors, words = model_tensors(original, foreign), "model.language_model.embed_tokens.weight"
    tensors[words] = torch.cat([tensors[words], draw(4, 32, seed=9)])
    tensors["lm_head.weight"] = draw(*tensors[words].shape, seed=10)
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_bytes((published / "model" / "config.json").read_bytes())
    made = convert(tmp_path, router="last")
    assert made.model.config.text.vocab_size == 196 and not made.model.config.text.tied_head
    save_model(made, tmp_path / "saved")
    language, ids = load_model(tmp_path / "saved").model.language, torch.tensor([[3, 50, 195, 60]])
    states = language.network(inputs_embeds=F.embedding(ids, tensors[words])).last_hidden_state
    torch.testing.assert_close(language.head(states), states @ tensors["lm_head.weight"].T)
    assert torch.equal(language.network.embed_tokens.weight, tensors[words])


def test_at_the_published_length_it_has_three_tokens_more_than_internvl(foreign, tmp_path):
    """151,678 rows with a head of its own beside InternVL3's 151,674, `<video>` and UniLIP's three after them."""
    original = Original(foreign, foreign.mllm(rows=foreign.INTERN_ROWS))
    write_published(foreign, tmp_path, original)
    language, width = original.mllm.model.language_model, foreign.WIDTH
    rows = torch.cat([language.embed_tokens.weight, draw(4, width, seed=9)])
    language.embed_tokens = nn.Embedding.from_pretrained(rows)
    original.mllm.lm_head = nn.Linear(width, len(rows), bias=False).requires_grad_(False)
    original.mllm.lm_head.weight.copy_(draw(*rows.shape, seed=10))
    save_file(model_tensors(original, foreign), tmp_path / "model" / "model.safetensors")
    made = convert(tmp_path, router="last")
    save_model(made, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved")
    text = loaded.model.config.text
    assert (text.vocab_size, text.tied_head) == (151_678, False)
    assert (text.image_token_id, text.eos_token_id) == (151_667, 151_645)
    start, end, image = 151_665, 151_666, text.image_token_id
    shown = [start, *[image] * 16, end]
    ids = torch.tensor([[0, 0, *shown, 50, 151_677], [1, 40, *shown, 43, 151_675]])
    mask, pixels = (ids != 0).long(), picture(count=2)
    with torch.no_grad():
        found = loaded.model.condition(ids, mask, loaded.model.tokenizer.encoder(pixels)).states
        wanted = original.condition(ids, mask, pixels)
        states = draw(1, 2, width, seed=11)
        torch.testing.assert_close(loaded.model.language.logits(states), original.mllm.lm_head(states))
    real = F.pad(mask, (0, QUERIES), value=1).bool()
    near(found[real], wanted[real], exact=True)


@pytest.mark.parametrize("form", ["pth", "safetensors", "nested"])
def test_a_tokenizer_alone_gives_the_same_images(foreign, original, published, tmp_path, form):
    """The LLM and the DiT are then the published ones; the file may be pickled, nested, or safe."""
    tensors = tokenizer_tensors(original, foreign)
    path = tmp_path / f"1b_unilip.{'pth' if form == 'nested' else form}"
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors} if form == "nested" else tensors, path)
    sources = {name: str(published / name) for name in SOURCES}
    made = convert_unilip(str(path), CONFIG, SamplingConfig(), sources, factor=FACTOR)
    tokenizer, pixels = made.model.tokenizer, picture()
    near(tokenizer.normalize(tokenizer.encode(pixels).z_f), original.encode(pixels), exact=True)
    parts = made.manifest["parts"]
    assert (parts["tokenizer.encoder"], parts["language"], parts["denoiser.network"]) == ("unilip", "mllm", "dit")
    assert "copies of the LLM's last" in parts["connector"]
    assert set(made.manifest["sources"]["unilip"]["sha256"]) == {path.name}


def test_a_head_of_its_training_is_dropped_as_its_own_loader_does(foreign, original, published, tmp_path):
    tensors = tokenizer_tensors(original, foreign) | {"regressor.0.weight": torch.ones(2, 2)}
    torch.save(tensors, tmp_path / "t.pth")
    assert convert_unilip(
        str(tmp_path / "t.pth"), CONFIG, SamplingConfig(), {n: str(published / n) for n in SOURCES}, factor=1.0
    )


def test_a_round_trip_through_a_folder_keeps_every_weight(converted, tmp_path):
    save_model(converted, tmp_path / "folder")
    again = load_model(tmp_path / "folder")
    assert again.model.config == converted.model.config
    own = converted.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in again.model.state_dict().items())


def test_the_verb_converts_a_model_that_names_its_parts(published, tmp_path, capsys):
    """What the checkpoint does not say is the recipe's; the folder draws, at any size."""
    line = ["convert", "unilip", str(published / "model"), "-o", str(tmp_path / "out")]
    assert main(line) == 2
    assert "align_depth: expected 1 to 3, got 6" in capsys.readouterr().err  # this DiT has three blocks
    assert not (tmp_path / "out").exists()
    assert main([*line, "--recipe", "tiny"]) == 0
    assert "router: passes the last layer on (dtr)" in capsys.readouterr().out
    pipe = SparPipeline.from_pretrained(tmp_path / "out", dtype=torch.float32, device="cpu")
    out = pipe.generate("a red circle", height=56, width=84, num_inference_steps=2, seed=0)
    assert out.images[0].size == (84, 56) and out.routing[0].tokens[-QUERIES - 1] == "<img>"
    assert out.routing[0].weights[:, -1].min() > 1 - 4 * PICKED


def test_training_from_there_says_where_the_recipe_differs(exact, tmp_path, caplog):
    save_model(exact, tmp_path / "folder")
    base = recipe("spar-1b")
    own = exact.model.config
    same = replace(base, model=own, alignment=replace(base.alignment, hidden=8))
    load_initial_weights(TrainingModules(same, {}), tmp_path / "folder", same.stages[0], same)
    assert not caplog.records
    other = replace(same, model=replace(own, streams=replace(own.streams, fusion="mlp")))
    load_initial_weights(TrainingModules(other, {}), tmp_path / "folder", other.stages[0], other)
    assert "was made with model.streams.fusion 'residual'; this recipe has 'mlp'" in caplog.text


# ---- what is refused -------------------------------------------------------------------------------------------------


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("kind", ["code", "object", "text", "cut", "list", "empty"])
def test_a_pickled_file_with_more_than_tensors_is_refused_and_nothing_runs(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    held = {"code": {"a": Hostile()}, "object": {"a": Path("x")}, "list": [torch.ones(1)], "empty": {}}
    if kind == "text":
        path.write_bytes(b"import os; os.system('touch pwned')")
    elif kind == "cut":
        torch.save({"a": torch.ones(9)}, path)
        path.write_bytes(path.read_bytes()[:-40])
    else:
        torch.save(held[kind], path)
    with pytest.raises(InputError, match="more than plain tensors, or is damaged|expected a dictionary of tensors"):
        TorchPickleReader(path)
    assert not (tmp_path / "pwned").exists()


def test_a_pickled_file_is_capped_packed_and_unpacked(tmp_path):
    import zipfile

    torch.save({"a": torch.zeros(100_000)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="expected at most 1000 bytes, got 4"):
        TorchPickleReader(tmp_path / "a.pth", max_bytes=1000)
    with zipfile.ZipFile(tmp_path / "a.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as bomb:
        for item in plain.infolist():
            bomb.writestr(item.filename, plain.read(item), compress_type=zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    with pytest.raises(InputError, match="expected at most 10000 bytes, got 4"):
        TorchPickleReader(tmp_path / "bomb.pth", max_bytes=10_000)


def test_a_foreign_file_is_named_for_what_it_lacks(published, tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="expected a checkpoint of UniLIP, with down_blocks .*, got weight"):
        convert_unilip(str(tmp_path / "a.safetensors"), CONFIG, SamplingConfig(), dict.fromkeys(SOURCES))


def test_a_tokenizer_without_its_factor_or_its_parts_is_refused(published):
    with pytest.raises(InputError, match=r"factor: expected the scale of UniLIP's latent .* above 0, got None"):
        convert(published, "tokenizer.pth")
    with pytest.raises(InputError, match=r"above 0, got 10000000.0 \(at most 1e\+06\)"):  # its folder would not load
        convert(published, "tokenizer.pth", factor=1e7)
    with pytest.raises(InputError, match="expected a folder or Hub id for mllm, autoencoder, dit, got none"):
        convert_unilip(str(published / "tokenizer.pth"), CONFIG, SamplingConfig(), dict.fromkeys(SOURCES), factor=1.0)


def test_what_does_not_fit_is_in_one_report(foreign, original, published, tmp_path):
    tensors = model_tensors(original, foreign)
    del tensors["model.vae_decoder.down_mlp.0.weight"]
    tensors["model.dit.proj_out.bias"] = torch.zeros(3)
    tensors["model.stranger"] = torch.ones(1)
    (tmp_path / "model").mkdir()
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_bytes((published / "model" / "config.json").read_bytes())
    with pytest.raises(InputError) as caught:
        convert(tmp_path)
    report = str(caught.value)
    assert "unilip: 1 missing (tokenizer.semantic_stream.projection.0.weight)" in report
    assert "1 of another shape (denoiser.network.proj_out.bias is (3,), expected (8,))" in report
    assert "1 unexpected in no part of ours (model.stranger (unknown))" in report
