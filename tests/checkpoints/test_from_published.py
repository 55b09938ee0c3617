"""`spar build`: published checkpoints, tiny and random but in the real formats, compute in SPAR what they computed."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from spar.checkpoints.formats.checkpoint_source import CheckpointSource
from spar.checkpoints.formats.internvl import read_text_tokenizer
from spar.checkpoints.from_published import build_from_published
from spar.checkpoints.spar_format import ModelBundle, SamplingConfig, load_model, load_training_part, save_model
from spar.cli.main import main
from spar.common.errors import InputError
from spar.inference.pipeline import SparPipeline
from spar.models.config import ConnectorConfig, DenoiserConfig, RouterConfig, SparConfig, StreamConfig, TextConfig
from spar.recipes import recipe
from spar.training.initial_weights import load_initial_weights
from spar.training.modules import TrainingModules
from spar.training.plan import read_init_folder

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
SAMPLING = SamplingConfig(shift=3.0, max_prompt_tokens=300)
PAPER = recipe("spar-1b").model
CONFIG = SparConfig(  # what a recipe says beside the parts, at this size
    text=TextConfig(layers=4, hidden_size=32, heads=4, kv_heads=2),
    streams=replace(PAPER.streams, residual_blocks=1, pixel_layers=1, pixel_heads=2),
    router=RouterConfig(count=2),
    connector=replace(PAPER.connector, queries=3, layers=2),
    denoiser=replace(PAPER.denoiser, layers=2, align_depth=2, self_attention="softmax"),  # not SANA's
)


def test_the_small_configuration_is_the_papers_kind():
    assert (CONFIG.connector.reference_scale, CONFIG.denoiser.position_gain) == ("raw", 0.0)
    assert isinstance(CONFIG.connector, ConnectorConfig) and isinstance(CONFIG.denoiser, DenoiserConfig)
    assert isinstance(CONFIG.streams, StreamConfig)


@pytest.fixture(scope="module")
def libraries(foreign):
    return {"mllm": foreign.mllm(), "autoencoder": foreign.autoencoder(), "dit": foreign.dit()}


@pytest.fixture(scope="module")
def pristine(foreign, libraries, tmp_path_factory) -> Path:
    """One folder a part, as they are published. Read them, never write into them."""
    root = tmp_path_factory.mktemp("published")
    foreign.save_hf(libraries["mllm"], root / "mllm")
    libraries["autoencoder"].save_pretrained(root / "autoencoder")
    foreign.save_dit(libraries["dit"], root / "dit")
    return root


@pytest.fixture
def published(pristine, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "published"))


def build(root: Path, config: SparConfig = CONFIG, **keywords) -> ModelBundle:
    sources = {part: str(root / part) for part in ("mllm", "autoencoder", "dit")}
    return build_from_published(config, SAMPLING, sources, **keywords)


@pytest.fixture(scope="module")
def assembled(pristine) -> ModelBundle:
    return build(pristine)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check_mllm(model, library) -> None:
    """Visual tokens and logits are the library's own."""
    pixels = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    f_v = model.tokenizer.encoder(pixels)
    wanted = library.model.get_image_features((pixels - MEAN) / STD).pooler_output
    torch.testing.assert_close(f_v, wanted, rtol=1e-4, atol=1e-5)
    ids = torch.tensor([[3, *[5] * 16, 4, 50, 60, 70]] * 2)
    logits = library(input_ids=ids, pixel_values=(pixels - MEAN) / STD).logits
    embeddings = model.embed(ids, f_v)
    mask = torch.ones_like(ids)
    from spar.models.attention import attention_bias, position_ids_from_mask

    final, _ = model.language(embeddings, attention_bias(mask, embeddings, causal=True), position_ids_from_mask(mask))
    torch.testing.assert_close(model.language.logits(final), logits, rtol=1e-4, atol=1e-4)


def test_the_mllm_computes_what_it_computed(assembled, libraries):
    check_mllm(assembled.model, libraries["mllm"])


def test_both_halves_of_the_autoencoder_compute_what_they_computed(assembled, libraries):
    library, pixels = libraries["autoencoder"], torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latent = library.encode(2 * pixels - 1).latent
        torch.testing.assert_close(assembled.pixel_encoder(pixels), latent, rtol=1e-4, atol=1e-4)
        decoded = (library.decode(latent).sample + 1) / 2
        torch.testing.assert_close(assembled.model.tokenizer.decoder(latent), decoded, rtol=1e-4, atol=1e-4)
    assert float(assembled.model.tokenizer.latent_scale) == pytest.approx(0.41407)


def test_the_dit_computes_what_it_computed(foreign, assembled, libraries):
    latent, time, condition = draw(2, 8, 3, 5), torch.tensor([0.3, 0.8]), draw(2, 7, foreign.CAPTION, seed=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    wanted = libraries["dit"](
        latent, encoder_hidden_states=condition, encoder_attention_mask=mask, timestep=1000 * time
    ).sample
    own = assembled.model.denoiser(latent, time, condition, mask).velocity
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [10**4, 10**9, 2**63, 10**400, float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "vocab_size", "rms_norm_eps", "rope_theta"])
def test_sizes_that_the_weights_do_not_bear_out_cost_nothing(published, name, value):
    path = published / "mllm" / "config.json"
    config = json.loads(path.read_text())
    config["text_config" if "text_config" in config else "llm_config"][name] = value
    path.write_text(json.dumps(config))
    if isinstance(value, int) and value < 2**63 and name in ("rms_norm_eps", "rope_theta"):
        return  # of any size
    start = time.monotonic()
    with pytest.raises(InputError):
        build(published)
    assert time.monotonic() - start < 5


def test_sizes_are_the_checkpoints_and_differences_are_reported(foreign, assembled):
    config = assembled.model.config
    assert (config.text.rope_theta, config.text.rope_factor, config.text.rms_norm_eps) == (1e6, 2.0, 1e-5)
    assert (config.vision.patch_size, config.vision.image_size, config.vision.layer_scale) == (14, 112, 0.1)
    assert config.autoencoder.decoder_blocks != config.autoencoder.encoder_blocks
    assert (config.denoiser.layers, config.denoiser.caption_channels) == (3, foreign.CAPTION)
    assert config.denoiser.self_attention == "linear"
    # What no checkpoint says is the recipe's.
    assert (config.streams, config.router, config.connector) == (CONFIG.streams, CONFIG.router, CONFIG.connector)
    assert "model.denoiser.layers: the recipe expects 2, the checkpoint has 3" in assembled.manifest["differences"]
    assert not any("streams" in line or "connector" in line for line in assembled.manifest["differences"])


def test_the_connector_starts_from_the_llms_last_layers(assembled):
    model = assembled.model
    for own, source in zip(model.connector.layers, model.language.network.layers[2:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), source.parameters(), strict=True))


def test_what_no_checkpoint_brings_is_random_by_the_seed_and_said_so(assembled, pristine):
    fresh = ("tokenizer.semantic_stream", "tokenizer.pixel_stream", "tokenizer.fusion", "router")
    again, other = build(pristine).model.state_dict(), build(pristine, seed=1).model.state_dict()
    for key, value in assembled.model.state_dict().items():
        assert torch.equal(value, again[key]) and torch.isfinite(value).all()
        varies = key.startswith((*fresh, "connector.queries", "connector.projection")) and value.std() > 0
        assert torch.equal(value, other[key]) != bool(varies), key
    parts = assembled.manifest["parts"]
    assert all("random weights of seed 0" in parts[part] for part in (*fresh, "connector"))
    assert "random weights" in parts["alignment head"]
    assert (parts["tokenizer.encoder"], parts["denoiser.network"]) == ("mllm", "dit")


def test_the_manifest_has_the_sums_of_the_files_that_were_read(assembled, pristine):
    import hashlib

    sources = assembled.manifest["sources"]
    assert set(sources) == {"mllm", "autoencoder", "dit"}
    digest = hashlib.sha256((pristine / "dit/transformer/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    assert sources["dit"]["sha256"]["transformer/diffusion_pytorch_model.safetensors"] == digest
    assert "config.json" in sources["mllm"]["sha256"] and sources["mllm"]["source"] == "mllm"


def test_the_manifest_names_every_file_that_was_read_and_no_other(foreign, libraries, published, opened):
    """Of repositories with all that the published ones have: shards and their index, templates, settings of others."""
    shutil.rmtree(published / "mllm")
    foreign.save_hf(libraries["mllm"], published / "mllm", shard="100KB")
    foreign.save_published_files(published / "mllm")
    (published / "mllm" / "special_tokens_map.json").write_text("{}")
    (published / "mllm" / "additional_chat_templates").mkdir()
    (published / "mllm" / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    for part in IDS:
        (published / part / "model_index.json").write_text("{}")
        (published / part / "README.md").write_text("of others")
    with opened(published) as names:
        made = build(published)
    assert {f"{part}/{file}" for part in IDS for file in made.manifest["sources"][part]["sha256"]} == names
    wanted = {
        "mllm/config.json", "mllm/tokenizer.json", "mllm/tokenizer_config.json", "mllm/model.safetensors.index.json",
        "mllm/chat_template.jinja", "mllm/additional_chat_templates/tools.jinja", "mllm/special_tokens_map.json",
        "autoencoder/config.json", "autoencoder/diffusion_pytorch_model.safetensors", "dit/transformer/config.json",
        "dit/transformer/diffusion_pytorch_model.safetensors", "dit/scheduler/scheduler_config.json",
    }  # fmt: skip
    shards = {f"mllm/{path.name}" for path in (published / "mllm").glob("*.safetensors")}
    assert names == wanted | shards and len(shards) > 1


def test_a_built_folder_loads_as_the_model_that_was_built(assembled, tmp_path):
    save_model(assembled, tmp_path / "model")
    again = load_model(tmp_path / "model")
    own = assembled.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in again.model.state_dict().items())
    encoder = load_training_part(tmp_path / "model", "pixel_encoder").state_dict()
    assert all(torch.equal(v, encoder[k]) for k, v in assembled.pixel_encoder.state_dict().items())
    assert again.sampling == SAMPLING
    ids = again.text_tokenizer.encode("<|im_start|>user\na red circle<|im_end|>\n<img><IMG_CONTEXT></img>")
    assert 5 in ids and again.text_tokenizer.eos_token == "<|im_end|>"


# ---- other layouts and revisions of the same parts -------------------------------------------------------------------


def test_the_original_layout_gives_the_same_model_and_its_code_never_runs(foreign, assembled, libraries, published):
    shutil.rmtree(published / "mllm")
    foreign.save_original(libraries["mllm"], published / "mllm")
    other = build(published).model
    assert other.config == assembled.model.config
    own = assembled.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in other.state_dict().items())


def test_shards_give_the_same_model(foreign, assembled, libraries, published):
    shutil.rmtree(published / "mllm")
    foreign.save_hf(libraries["mllm"], published / "mllm", shard="100KB")
    assert len(list((published / "mllm").glob("*.safetensors"))) > 1
    own, other = (made.model.state_dict() for made in (assembled, build(published)))
    assert all(torch.equal(value, own[key]) for key, value in other.items())


def newer_names(tensors: dict[str, torch.Tensor]) -> None:
    """As transformers holds them in memory, and some files have them."""
    for key in list(tensors):
        new = "model." + key.replace("language_model.model.", "language_model.")
        tensors["lm_head.weight" if key == "language_model.lm_head.weight" else new] = tensors.pop(key)


def test_both_names_of_the_llm_and_of_the_image_token_are_known(foreign, assembled, published):
    foreign.edit_tensors(published / "mllm/model.safetensors", newer_names)
    foreign.edit_json(published / "mllm/config.json", image_token_id=..., image_token_index=5)
    own, other = (made.model.state_dict() for made in (assembled, build(published)))
    assert all(torch.equal(value, own[key]) for key, value in other.items())


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_an_untied_head_is_taken_over(foreign, published, layout):
    library = foreign.mllm(tied=False)
    shutil.rmtree(published / "mllm")
    (foreign.save_hf if layout == "hf" else foreign.save_original)(library, published / "mllm")
    made = build(published)
    assert not made.model.config.text.tied_head
    assert "model.text.tied_head: the recipe expects True, the checkpoint has False" in made.manifest["differences"]
    check_mllm(made.model, library)


def test_a_stored_head_that_differs_from_tied_words_is_kept(foreign, published, tmp_path):
    """As transformers 5 does; a stored head that is the same stays tied."""
    folder, head = published / "mllm", foreign.mllm(tied=False).lm_head.weight

    def add(tensors, value=None):
        words = tensors["language_model.model.embed_tokens.weight"]
        tensors["language_model.lm_head.weight"] = words.clone() if value is None else value

    foreign.edit_tensors(folder / "model.safetensors", lambda tensors: add(tensors))
    assert build(published).model.config.text.tied_head
    foreign.edit_tensors(folder / "model.safetensors", lambda tensors: add(tensors, head.clone()))
    made = build(published)
    assert not made.model.config.text.tied_head and torch.equal(made.model.language.head.weight, head)
    check_mllm(made.model, InternVLForConditionalGeneration.from_pretrained(folder).eval())
    save_model(made, tmp_path / "model")
    assert torch.equal(load_model(tmp_path / "model").model.language.head.weight, head)


def test_bfloat16_weights_stay_as_they_are_also_on_disk(foreign, libraries, published, tmp_path):
    foreign.edit_tensors(
        published / "dit/transformer/diffusion_pytorch_model.safetensors",
        lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()}),
    )
    made = build(published)
    assert {p.dtype for p in made.model.denoiser.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in made.model.language.parameters()} == {torch.float32}
    save_model(made, tmp_path / "model")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "model/denoiser/model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}


def test_the_shift_of_sampling_is_the_schedulers_and_no_other_name_is_read_for_it(foreign, libraries, published):
    """SANA's scheduler says `flow_shift`; a field `shift` beside it is none of its own."""
    foreign.save_dit(libraries["dit"], published / "dit", shift=6.0)
    foreign.edit_json(published / "dit/scheduler/scheduler_config.json", shift=1.0)
    made = build(published)
    assert made.sampling == replace(SAMPLING, shift=6.0)
    assert "sampling.shift: the recipe expects 3.0, the checkpoint has 6.0" in made.manifest["differences"]
    shutil.rmtree(published / "dit/scheduler")
    assert build(published).sampling == SAMPLING


# ---- what does not fit is refused ------------------------------------------------------------------------------------


def test_scaled_positions_of_our_own_grid_are_the_librarys(foreign, libraries, published):
    path = published / "dit/transformer/config.json"
    foreign.edit_json(path, interpolation_scale=2)
    library = type(libraries["dit"]).from_config(json.loads(path.read_text()))
    library.load_state_dict(libraries["dit"].state_dict())
    latent, time, condition = draw(1, 8, 4, 4), torch.tensor([0.3]), draw(1, 7, foreign.CAPTION, seed=1)
    mask = torch.ones(1, 7, dtype=torch.long)
    with torch.no_grad():
        wanted = library(latent, encoder_hidden_states=condition, encoder_attention_mask=mask, timestep=1000 * time)
        own = build(published).model.denoiser(latent, time, condition, mask).velocity
    torch.testing.assert_close(own, wanted.sample, rtol=1e-4, atol=1e-4)


def test_a_file_whose_name_is_no_text_is_recorded_as_text(tmp_path):
    path = tmp_path / "unilip\udcff.json"
    path.write_text("{}")
    source = CheckpointSource.of_file(path)
    source.config(path.name)
    record = source.record()
    assert (record["source"], [*record["sha256"]]) == ("unilip?.json", ["unilip?.json"])


def test_everything_that_does_not_fit_is_in_one_report(foreign, published):
    foreign.edit_tensors(
        published / "mllm/model.safetensors",
        lambda t: (t.pop("vision_tower.embeddings.cls_token"), t.update(stranger=torch.ones(1))),
    )
    foreign.edit_tensors(
        published / "dit/transformer/diffusion_pytorch_model.safetensors",
        lambda t: t.update({"proj_out.weight": torch.zeros(3, 32)}),
    )
    foreign.edit_tensors(
        published / "autoencoder/diffusion_pytorch_model.safetensors",
        lambda t: t.update({"decoder.extra": torch.ones(1)}),
    )
    with pytest.raises(InputError) as caught:
        build(published)
    report = str(caught.value)
    assert "mllm: 1 missing (tokenizer.encoder.vision_tower.embeddings.cls_token)" in report
    assert "dit: 1 of another shape (denoiser.network.proj_out.weight is (3, 32), expected (8, 32))" in report
    assert "autoencoder: 1 unexpected (tokenizer.decoder.network.extra)" in report
    assert "1 unexpected in no part of ours (stranger (unknown))" in report


def test_a_fused_matrix_that_does_not_split_in_three_is_refused(foreign, libraries, published):
    shutil.rmtree(published / "mllm")
    foreign.save_original(libraries["mllm"], published / "mllm")
    name = "vision_model.encoder.layers.0.attn.qkv.weight"
    foreign.edit_tensors(published / "mllm/model.safetensors", lambda t: t.update({name: t[name][:-1].clone()}))
    with pytest.raises(InputError, match="3 of another shape .*q_proj|3 of another shape .*k_proj"):
        build(published)


@pytest.mark.parametrize(
    ("file", "fields", "message"),
    [
        ("mllm/config.json", {"downsample_ratio": 0.25}, "downsample_ratio: expected 0.5, got 0.25"),
        ("mllm/config.json", {"vision_feature_layer": -2}, "vision_feature_layer: expected -1, got -2"),
        ("mllm/config.json", {"image_token_id": 6}, "image_token_id: expected that of <IMG_CONTEXT>, 5, got 6"),
        ("mllm/config.json", {"vision_config": ...}, "expected a field vision_config"),
        ("mllm/config.json", {"text_config": []}, "text_config: expected an object with fields, got list"),
        ("autoencoder/config.json", {"_class_name": "AutoencoderKL"}, "_class_name: expected 'AutoencoderDC'"),
        ("autoencoder/config.json", {"decoder_norm_types": "batch_norm"}, "expected 'rms_norm' throughout"),
        ("autoencoder/config.json", {"encoder_block_out_channels": [8] * 6}, "alike, got different ones"),
        ("autoencoder/config.json", {"decoder_in_shortcut": False}, "decoder_in_shortcut: expected True, got False"),
        ("autoencoder/config.json", {"encoder_layers_per_block": 3}, "block: expected whole numbers, got 3"),
        ("autoencoder/config.json", {"encoder_block_out_channels": ["8"] * 6}, "channels: expected whole numbers, got"),
        ("autoencoder/config.json", {"encoder_block_types": 7}, "expected a name or a list of names, got 7"),
        ("autoencoder/config.json", {"decoder_act_fns": [1] * 6}, "expected a name or a list of names, got"),
        ("autoencoder/config.json", {"decoder_qkv_multiscales": [5]}, "expected lists of whole numbers, got"),
        ("autoencoder/config.json", {"scaling_factor": 0}, "expected scaling_factor above 0, got 0"),
        ("autoencoder/config.json", {"scaling_factor": 1e7}, "scaling_factor above 0, got 10000000.0 .at most 1e"),
        ("autoencoder/config.json", {"scaling_factor": "1"}, "expected scaling_factor above 0, got '1'"),
        ("dit/transformer/config.json", {"qk_norm": "rms_norm"}, "qk_norm: expected None, got 'rms_norm'"),
        ("dit/transformer/config.json", {"guidance_embeds": True}, "guidance_embeds: expected False, got True"),
        ("dit/transformer/config.json", {"num_layers": "3"}, "num_layers: expected a number, got '3'"),
        ("dit/transformer/config.json", {"in_channels": 4, "out_channels": 4}, "DiT denoises 4 channels"),
        ("dit/transformer/config.json", {"interpolation_scale": 2, "sample_size": 8},
         "interpolation_scale: expected none where sample_size is not the model's grid of 4 .* 2 and sample_size 8"),
        ("dit/scheduler/scheduler_config.json", {"_class_name": "DDIM"}, "expected a scheduler of the kinds"),
        ("dit/scheduler/scheduler_config.json", {"_class_name": ["DDIM"]}, "expected a scheduler of the kinds"),
    ],
)
def test_a_configuration_that_we_cannot_compute_is_refused(foreign, published, file, fields, message):
    foreign.edit_json(published / file, **fields)
    with pytest.raises(InputError, match=message):
        build(published)


@pytest.mark.parametrize(
    ("part", "fields", "message"),
    [
        ("vision_config", {"use_qk_norm": True}, "use_qk_norm: expected False, got True"),
        ("vision_config", {"hidden_act": "relu"}, "hidden_act: expected 'gelu', got 'relu'"),
        ("vision_config", {"attention_bias": False}, "attention_bias: expected True, got False"),
        ("vision_config", {"patch_size": [14, 16]}, r"patch_size: expected a square, got \[14, 16\]"),
        ("text_config", {"model_type": "llama"}, "model_type: expected 'qwen2', got 'llama'"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type default or dynamic, got 'yarn'"),
        ("text_config", {"rope_parameters": {"rope_theta": [1e6]}}, r"rope_theta: expected a number, got \[1000000"),
    ],
)
def test_a_part_of_the_mllm_that_we_cannot_compute_is_refused(foreign, published, part, fields, message):
    inner = json.loads((published / "mllm/config.json").read_text())[part]
    foreign.edit_json(published / "mllm/config.json", **{part: inner | fields})
    with pytest.raises(InputError, match=message):
        build(published)


def test_pickled_weights_are_never_read_here(published):
    (published / "mllm/model.safetensors").rename(published / "mllm/pytorch_model.bin")
    with pytest.raises(InputError, match=r"expected weights as model.safetensors, found only pytorch_model.bin, which"):
        build(published)


def test_a_vocabulary_with_merges_is_a_text_tokenizer_too(tmp_path, opened):
    """As the original repositories may have it: Qwen2's two files and the added tokens."""
    words = {word: i for i, word in enumerate(["<unk>", "a", "b", "ab"])}
    (tmp_path / "vocab.json").write_text(json.dumps(words))
    (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    added = {str(len(words) + i): {"content": text, "special": True} for i, text in enumerate(special)}
    config = {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<|endoftext|>", "added_tokens_decoder": added}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    source = CheckpointSource(tmp_path, "mllm")
    with opened(tmp_path) as names:
        tokenizer = read_text_tokenizer(source)
    assert names == set(source.record()["sha256"]) == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert tokenizer.encode("ab<IMG_CONTEXT>") == [3, 9]
    assert (tokenizer.eos_token, tokenizer.pad_token_id) == ("<|im_end|>", 4)


def test_a_text_tokenizer_without_our_tokens_is_refused(published):
    for path in (published / "mllm").glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<IMG_CONTEXT>", "<OTHER>"))
    with pytest.raises(InputError, match="a text tokenizer that knows <IMG_CONTEXT>"):
        build(published)


# ---- where parts come from -------------------------------------------------------------------------------------------


COMMITS = {"mllm": "a" * 40, "autoencoder": "b" * 40, "dit": "c" * 40}


@pytest.fixture
def hub(published, tmp_path, monkeypatch) -> Path:
    """A cache of the Hub as snapshot_download leaves it, with one commit of each part; offline."""
    cache = tmp_path / "hub"
    for part, commit in COMMITS.items():
        repository = cache / f"models--someone--{part}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.move(published / part, repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return cache


IDS = {part: f"someone/{part}" for part in ("mllm", "autoencoder", "dit")}


def test_hub_ids_are_read_from_the_cache_and_their_commits_are_noted(hub, assembled):
    made = build_from_published(CONFIG, SAMPLING, IDS, revisions={"dit": COMMITS["dit"]})
    own = assembled.model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in made.model.state_dict().items())
    local = assembled.manifest["sources"]
    wanted = {
        part: {"source": f"someone/{part}", "commit": COMMITS[part], "sha256": local[part]["sha256"]} for part in IDS
    }
    assert made.manifest["sources"] == wanted


def test_a_commit_that_is_not_here_cannot_be_had_offline(hub):
    with pytest.raises(InputError, match="dit: someone/dit cannot be had from the Hub or its cache"):
        build_from_published(CONFIG, SAMPLING, IDS, revisions={"dit": "d" * 40})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "dit: expected a folder or a Hub id such as OWNER/NAME, got 'nowhere'"),
        ("a/b/c", "expected a folder or a Hub id"),
        *((name, f"dit: there is no such folder or file, got '{name}'") for name in (
            "../x/y", "./InternVL3-2B", "~/model", "/nowhere/model", "checkpoint.pth", "dir/unet.safetensors",
        )),
    ],
)
def test_a_source_that_is_neither_folder_nor_id_is_refused(pristine, source, message):
    sources = {part: str(pristine / part) for part in IDS} | {"dit": source}
    with pytest.raises(InputError, match=message):
        build_from_published(CONFIG, SAMPLING, sources)


def test_a_local_folder_has_no_revision(pristine):
    with pytest.raises(InputError, match="dit: a local folder has no revision, got 'main'"):
        build(pristine, revisions={"dit": "main"})
    with pytest.raises(InputError, match="revision: expected parts of mllm, autoencoder, dit, got vae"):
        build(pristine, revisions={"vae": "main"})


# ---- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep(foreign, libraries, tmp_path_factory) -> Path:
    """As `pristine`, deep enough for the recipes: six LLM layers and six DiT blocks."""
    root = tmp_path_factory.mktemp("deep")
    foreign.save_hf(foreign.mllm(layers=6), root / "mllm")
    libraries["autoencoder"].save_pretrained(root / "autoencoder")
    foreign.save_dit(foreign.dit(layers=6), root / "dit")
    return root


def verb(deep: Path, output: Path, *more: str) -> int:
    sources = [word for part in IDS for word in (f"--{part}", str(deep / part))]
    return main(["build", "spar-1b", *sources, "-o", str(output), *more])


def test_spar_build_writes_a_folder_that_draws(deep, tmp_path, capsys):
    assert verb(deep, tmp_path / "built") == 0
    output = capsys.readouterr()
    assert "pixel_encoder: autoencoder" in output.out and output.out.endswith(f"{tmp_path / 'built'}\n")
    assert "spar: note: model.text.layers: the recipe expects 24, the checkpoint has 6" in output.err
    manifest = json.loads((tmp_path / "built" / "manifest.json").read_text())
    assert (manifest["recipe"], manifest["seed"]) == ("spar-1b", 0)
    assert str(tmp_path) not in (tmp_path / "built" / "manifest.json").read_text()  # no path of one machine
    pipe = SparPipeline.from_pretrained(tmp_path / "built", dtype=torch.float32, device="cpu")
    picture = pipe.generate("a red circle", height=56, width=112, num_inference_steps=2, seed=0).images[0]
    assert picture.size == (112, 56)
    assert pipe.edit(picture, "remove the red circle", num_inference_steps=2, seed=0).images[0].size == (168, 84)
    assert verb(deep, tmp_path / "built") == 2
    assert "exists already; give another name, or --overwrite" in capsys.readouterr().err
    assert verb(deep, tmp_path / "built", "--overwrite", "--seed", "1") == 0


def test_another_programs_folder_is_refused_before_any_part_is_looked_for(tmp_path, capsys, monkeypatch):
    def fetched(*_, **__):
        raise AssertionError("a part was looked for")

    for module in ("from_published", "from_unilip", "from_dualtoken"):
        monkeypatch.setattr(f"spar.checkpoints.{module}.fetch", fetched)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "qwen2"}')
    parts = "--mllm a/b --autoencoder a/b --dit a/b"
    towers = "--vision a/b --llm a/b"
    for line in (
        f"build spar-1b {parts}", f"build dualtoken-3b {towers}", f"convert unilip a/b {parts}",
        f"convert dualtoken x.pth {towers}",
    ):
        assert main([*line.split(), "-o", str(theirs), "--overwrite"]) == 2
        assert "folder; expected an empty or new folder" in capsys.readouterr().err
    assert [path.name for path in theirs.iterdir()] == ["config.json"]


def test_training_the_tokenizer_may_start_from_a_built_folder(deep, tmp_path):
    """The folder holds E_p, which the first tokenizer stage needs, and no heads: those stay random."""
    assert verb(deep, tmp_path / "built") == 0
    base = recipe("spar-1b")
    model = load_model(tmp_path / "built").model.config
    real = replace(base, model=model, alignment=replace(base.alignment, hidden=8))
    modules, stage = TrainingModules(real, {}), real.stages[0]
    load_initial_weights(modules, tmp_path / "built", stage, real)
    encoder = load_training_part(tmp_path / "built", "pixel_encoder")
    own = modules.pixel_encoder.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in encoder.state_dict().items())
    shutil.rmtree(tmp_path / "built" / "pixel_encoder")
    with pytest.raises(InputError, match="needs the autoencoder's encoder, which .* does not hold"):
        stage.objective.check_folder(stage, read_init_folder(real, tmp_path / "built"))


@pytest.mark.parametrize("revision", ["main", "dit=", "vae=main", "=main"])
def test_a_revision_that_names_no_part_is_refused(deep, tmp_path, capsys, revision):
    assert verb(deep, tmp_path / "built", "--revision", revision) == 2
    assert f"expected PART=COMMIT of mllm, autoencoder, dit, vision, llm, got {revision!r}" in capsys.readouterr().err
