"""The tokenizer in other people's diffusion code: diffusers' own pipeline and image processor run on it unchanged."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file

import spar
from spar.checkpoints.spar_format import load_tokenizer, save_tokenizer
from spar.common.errors import InputError
from spar.inference.diffusers_autoencoder import AutoencoderSpar
from spar.inference.pipeline import SparPipeline


@pytest.fixture(scope="module")
def folder(tiny_run):
    return tiny_run.path / "model"


@pytest.fixture(scope="module")
def vae(folder) -> AutoencoderSpar:
    return AutoencoderSpar.from_pretrained(folder)


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_the_latent_is_the_tokenizers_and_the_scale_its_own(vae, pixels, folder):
    tokenizer = load_tokenizer(folder / "tokenizer")
    latent = vae.encode(pixels).latent
    torch.testing.assert_close(latent, tokenizer.encode((pixels + 1) / 2).z_f, rtol=0, atol=1e-6)
    torch.testing.assert_close(latent * vae.config.scaling_factor, tokenizer.normalize(latent))
    assert vae.config.scaling_factor == float(tokenizer.latent_scale) != 1
    assert latent.shape == (2, vae.config.latent_channels, 8, 8) and vae.config["latent_channels"] == 8
    assert vae.spatial_compression_ratio == 2 ** (len(vae.config.encoder_block_out_channels) - 1) == 8


def test_opening_warns_of_nothing(folder, monkeypatch):
    said = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", said.append)
    half = AutoencoderSpar.from_pretrained(folder, torch_dtype="bfloat16")
    assert {value.dtype for value in half.parameters()} == {torch.bfloat16} and not said


def test_there_and_back_is_reconstruct(vae, folder, pixels):
    pipe = SparPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    processor = VaeImageProcessor(vae_scale_factor=vae.spatial_compression_ratio)
    (back,) = processor.postprocess(vae(processor.preprocess(picture)).sample)
    (wanted,) = pipe.reconstruct(picture).images
    assert np.abs(np.asarray(back).astype(int) - np.asarray(wanted)).max() <= 1
    assert torch.equal(vae(pixels).sample, vae.decode(vae.encode(pixels).latent, return_dict=False)[0])
    assert torch.equal(vae.encode(pixels, return_dict=False)[0], vae.encode(pixels).latent)


def test_an_image_need_not_be_square_but_fit_the_cells(vae):
    wide = torch.zeros(1, 3, 48, 88)
    assert vae.encode(wide).latent.shape[-2:] == (6, 11) and vae(wide).sample.shape == wide.shape
    for shape in ((1, 3, 60, 64), (1, 3, 64, 60), (1, 1, 64, 64), (3, 64, 64)):
        with pytest.raises(InputError, match="sides in multiples of 8"):
            vae.encode(torch.zeros(shape))


def test_sana_draws_with_it_in_place_of_its_own_autoencoder(vae):
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    words, mask = torch.randn(2, 1, 5, 12), torch.ones(1, 5)

    def draw(**keywords):
        return pipe(
            prompt=None, negative_prompt=None, prompt_embeds=words[0], prompt_attention_mask=mask,
            negative_prompt_embeds=words[1], negative_prompt_attention_mask=mask, height=64, width=96,
            num_inference_steps=3, use_resolution_binning=False,
            generator=torch.Generator().manual_seed(0), **keywords,
        ).images  # fmt: skip

    latent = draw(output_type="latent")
    assert latent.shape == (1, 8, 8, 12)
    image = draw(output_type="pt")
    with torch.no_grad():
        wanted = vae.tokenizer.decode(vae.tokenizer.denormalize(latent)).clamp(0, 1)
    torch.testing.assert_close(image, wanted, rtol=0, atol=1e-5)
    assert image.std() > 0.01 and draw()[0].size == (96, 64)


def test_tiling_is_the_tokenizers(vae):
    latent = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    plain, tiled = vae.decode(latent).sample, 2 * vae.tokenizer.decode(latent, 8) - 1
    square = {"tile_sample_min_height": 64, "tile_sample_min_width": 64}
    for arguments in ({"tile": 8}, {"tile_sample_min_height": 64}, square):
        vae.enable_tiling(**arguments)
        try:
            torch.testing.assert_close(vae.decode(latent).sample, tiled)
            assert not torch.allclose(vae.decode(latent).sample, plain)
        finally:
            vae.disable_tiling()
    assert torch.equal(vae.decode(latent).sample, plain)
    for arguments, message in (
        ({"tile": 1}, "tile: expected"), ({"tile_sample_min_width": 60}, "multiple of 8, got 60"),
        ({"tile_sample_min_height": 64, "tile_sample_min_width": 128}, "square tiles"),
        ({"tile": 8, "tile_sample_min_height": 64}, "square tiles"),
        ({"tile_sample_stride_width": 32}, "tile_sample_stride: expected none"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            vae.enable_tiling(**arguments)
    assert not vae.use_tiling


def test_slices_are_computed_one_by_one(vae, pixels, monkeypatch):
    whole, sizes, encode = vae(pixels).sample, [], vae.tokenizer.encode
    monkeypatch.setattr(vae.tokenizer, "encode", lambda rows: sizes.append(len(rows)) or encode(rows))
    vae.enable_slicing()
    try:
        torch.testing.assert_close(vae(pixels).sample, whole, rtol=0, atol=1e-5)
    finally:
        vae.disable_slicing()
    assert sizes == [1, 1]


def test_a_save_that_is_stopped_leaves_the_old_one_and_what_lies_beside_it(vae, tmp_path, monkeypatch):
    folder = tmp_path / "vae"
    vae.save_pretrained(folder)
    (folder / "README.md").write_text("mine")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def stopped(*_, **__):
        raise KeyboardInterrupt

    def full(*_, **__):
        raise SafetensorError("No space left on device")

    for module, name, error in (
        (vae, "save_config", stopped), (safetensors.torch, "save_file", stopped), (safetensors.torch, "save_file", full)
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(module, name, error)
            with pytest.raises(KeyboardInterrupt if error is stopped else InputError):
                vae.save_pretrained(folder, max_shard_size="20KB")
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert not (folder / ".saving").exists()
    vae.save_pretrained(folder, max_shard_size="20KB")
    shards = {path.name for path in folder.iterdir()} - {"config.json", "README.md"}
    assert len(shards) > 2 and "diffusion_pytorch_model.safetensors" not in shards
    vae.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == {path.name for path in before}


def test_variants_lie_beside_each_other_and_a_folder_may_be_where_one_works_or_a_link(vae, tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    vae.save_pretrained(".")
    vae.save_pretrained(tmp_path / "link", variant="fp16")
    vae.save_pretrained(tmp_path / "link", variant="fp16", max_shard_size="20KB")
    names = {path.name for path in Path().iterdir()}
    assert {"config.json", "diffusion_pytorch_model.safetensors"} < names
    assert "diffusion_pytorch_model.fp16.safetensors" not in names
    assert sum(".fp16" in name for name in names) == len(names) - 2 > 2
    assert (tmp_path / "link").is_symlink()


def test_it_is_saved_and_loaded_and_nothing_else_is_overwritten(vae, pixels, tmp_path, folder):
    vae.save_pretrained(tmp_path / "alone")
    again = spar.AutoencoderSpar.from_pretrained(tmp_path / "alone")
    assert dict(again.config, _name_or_path="") == dict(vae.config, _name_or_path="")
    assert torch.equal(again(pixels).sample, vae(pixels).sample)
    assert not again.training and not any(one.requires_grad for one in again.parameters())
    again.save_pretrained(tmp_path / "alone")  # an older one of its kind gives way
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone"]
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors"
    }  # fmt: skip
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"format": "spar"}')
    with pytest.raises(InputError, match="it stays as it is"):
        vae.save_pretrained(tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["config.json"]
    with pytest.raises(InputError, match="a pickle may run code"):
        vae.save_pretrained(tmp_path / "pickled", True, None, False)
    with pytest.raises(InputError, match="got the file"):
        vae.save_pretrained(tmp_path / "mine" / "config.json")
    with pytest.raises(InputError, match="SPAR"):
        AutoencoderSpar.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="variant: expected none"):
        AutoencoderSpar.from_pretrained(folder, variant="fp16")
    with pytest.raises(InputError, match="cache: expected none of them"):
        AutoencoderSpar.from_pretrained(folder, cache="typo", low_cpu_mem_usage=True)
    with pytest.raises(InputError, match="revision: a local folder has none, got 'v1'"):
        AutoencoderSpar.from_pretrained(folder, revision="v1")
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "diffusion_pytorch_model.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match="it stays as it is"):
        vae.save_pretrained(weights)


def test_a_pipeline_of_diffusers_is_saved_and_loaded_with_it(vae, pixels, tmp_path):
    transformer = SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "sana")
    again = SanaPipeline.from_pretrained(tmp_path / "sana", tokenizer=None, text_encoder=None)
    assert type(again.vae) is AutoencoderSpar and torch.equal(again.vae(pixels).sample, vae(pixels).sample)
    part = AutoencoderSpar.from_pretrained(tmp_path / "sana", subfolder="vae")
    assert torch.equal(part(pixels).sample, vae(pixels).sample)
    with pytest.raises(InputError, match="is no spar-tokenizer folder"):
        AutoencoderSpar.from_pretrained(tmp_path / "sana", subfolder="transformer")


def test_a_new_process_loads_the_pipeline_as_the_documents_say(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    index = {"_class_name": "SanaPipeline", "vae": ["spar.inference.diffusers_autoencoder", "AutoencoderSpar"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    code = (
        "from spar import AutoencoderSpar\nfrom diffusers import SanaPipeline\n"
        "others = dict.fromkeys(('tokenizer', 'text_encoder', 'transformer', 'scheduler'))\n"
        f"print(type(SanaPipeline.from_pretrained({str(tmp_path)!r}, **others).vae).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-1:] == ["AutoencoderSpar"], done.stderr[-2000:]


def test_a_configuration_makes_another_one(vae, pixels, tmp_path):
    made = AutoencoderSpar.from_config(vae.config)
    assert made.config["sizes"] == vae.config["sizes"] and made.config.latent_channels == vae.config.latent_channels
    made.load_state_dict(vae.state_dict())
    made.eval().save_pretrained(tmp_path)
    assert torch.equal(AutoencoderSpar.from_pretrained(tmp_path)(pixels).sample, vae(pixels).sample)
    with pytest.raises(InputError, match="sizes: expected those of a model, got UnifiedTokenizer; see from_tokenizer"):
        AutoencoderSpar(vae.tokenizer)
    assert torch.equal(AutoencoderSpar.from_tokenizer(vae.tokenizer)(pixels).sample, vae(pixels).sample)


def test_weights_that_do_not_fit_are_refused(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    weights = {name: value.clone() for name, value in vae.state_dict().items()}
    first = min(name for name in weights if "decoder" in name)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in weights.items() if name != first}, path)
    with pytest.raises(InputError, match="does not fit AutoencoderSpar: missing_keys"):
        AutoencoderSpar.from_pretrained(tmp_path)
    save_file({**weights, "more": weights[first].clone()}, path)
    with pytest.raises(InputError, match="unexpected_keys more"):
        AutoencoderSpar.from_pretrained(tmp_path)
    path.unlink()
    index = {"metadata": {}, "weight_map": {name: "shard.bin" for name in weights}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="expected files of safetensors alone"):
        AutoencoderSpar.from_pretrained(tmp_path)


def test_a_pickle_is_never_loaded(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(vae.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    for keywords in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match="no file named diffusion_pytorch_model.safetensors"):
            AutoencoderSpar.from_pretrained(tmp_path, **keywords)


def test_half_precision_is_close_and_keeps_the_scale(vae, pixels, folder, tmp_path):
    half = AutoencoderSpar.from_pretrained(folder, torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.device.type == "cpu"
    assert half.config.scaling_factor == vae.config.scaling_factor
    error = (half(pixels.bfloat16()).sample.float() - vae(pixels).sample).abs().mean()
    assert 0 < error < 0.05
    half.save_pretrained(tmp_path / "half")
    assert AutoencoderSpar.from_pretrained(tmp_path / "half").config.scaling_factor == vae.config.scaling_factor


def test_a_folder_that_half_exists_gets_a_message(vae, tmp_path):
    save_tokenizer(vae.tokenizer, tmp_path / "alone")
    (tmp_path / "alone" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        AutoencoderSpar.from_pretrained(tmp_path / "alone")
