"""DualToken from published parts: SigLIP and Qwen2 by transformers, and the public tokenizer's own format.

No checkpoint of these configurations was published. The names are those that the released classes list; here a random
one is written under them, by rules of their own, and must come back as the same function.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, SiglipConfig, SiglipModel

from spar.checkpoints.dualtoken_format import load_dualtoken, save_dualtoken
from spar.checkpoints.from_dualtoken import build_dualtoken, convert_dualtoken
from spar.cli.main import main
from spar.common.errors import InputError
from spar.models.dualtoken.config import DualTokenConfig, PixelDecoderConfig, QuantizerConfig, VisionTowerConfig
from spar.models.dualtoken.sampling import CodeSampling
from spar.models.dualtoken.tokenizer import DualTokenizer
from spar.recipes import recipe

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "user", "assistant", "\n", "a", "red", "circle", "image"]


def words(extra=(), **special):
    table = {word: i for i, word in enumerate([*WORDS, *extra])}
    tokenizer = Tokenizer(WordLevel(table, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=WORDS[0], **special)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory, foreign):
    """SigLIP as transformers saves it: 9 layers, images of 48 pixels in patches of 12."""
    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 32, "num_hidden_layers": 9, "num_attention_heads": 2, "intermediate_size": 48}
    config = SiglipConfig(
        vision_config={**sizes, "image_size": 48, "patch_size": 12},
        text_config={**sizes, "num_hidden_layers": 2, "vocab_size": 40, "max_position_embeddings": 8,
                     "projection_size": 32, "hidden_act": "gelu_pytorch_tanh"},
    )  # fmt: skip
    model = foreign.randomize(SiglipModel(config))
    model.save_pretrained(folder)
    words(["star"]).save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, foreign):
    """A Qwen2 LLM with spare rows for the image tokens, its head tied."""
    folder = tmp_path_factory.mktemp("qwen")
    config = Qwen2Config(
        vocab_size=24, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = foreign.randomize(Qwen2ForCausalLM(config))
    model.tie_weights()
    model.save_pretrained(folder)
    words(eos_token="<|im_end|>").save_pretrained(folder)
    return folder, model


def settings(depth=3, entries=16) -> DualTokenConfig:
    codes = QuantizerConfig(depth=depth, entries=entries, width=8, codebook="shared")
    base = recipe("dualtoken-tiny").model
    vision = VisionTowerConfig(hidden_size=32, layers=9, heads=2, intermediate_size=48, patch_size=12, image_size=48)
    return DualTokenConfig(
        vision=vision, text_tower=base.text_tower, pixel=codes, semantic=codes, text=base.text,
        decoder=PixelDecoderConfig(channels=(32, 32, 64), layers=1, groups=32, grid=12),
        pixel_head=base.pixel_head, semantic_head=base.semantic_head,
    )  # fmt: skip


@pytest.fixture(scope="module")
def built(siglip, qwen):
    sources = {"vision": str(siglip[0]), "llm": str(qwen[0])}
    return build_dualtoken(settings(), CodeSampling(), sources, recipe="some")


# ---- build -----------------------------------------------------------------------------------------------------------


def test_the_built_towers_and_llm_compute_what_the_published_ones_do(built, siglip, qwen):
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[6, 7, 8, 0, 0, 0, 0, 0]])
    tokenizer = built.model.tokenizer
    with torch.no_grad():
        wanted = siglip[1](input_ids=tokens, pixel_values=pixels * 2 - 1)
        hidden = siglip[1].vision_model(pixels * 2 - 1, output_hidden_states=True).hidden_states
    taps = built.model.config.vision.taps
    assert taps == (1, 2, 8)
    torch.testing.assert_close(tokenizer.features(pixels).deep, hidden[8], rtol=1e-4, atol=1e-4)
    pooled = torch.nn.functional.normalize(tokenizer.encoder(pixels)[1], dim=1)
    torch.testing.assert_close(pooled, wanted.image_embeds, rtol=1e-4, atol=1e-4)
    text = torch.nn.functional.normalize(tokenizer.text_tower(tokens), dim=1)
    torch.testing.assert_close(text, wanted.text_embeds, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[6, 7, 8, 9]])
    language = built.model.language
    bias = torch.full((4, 4), -6e4).triu(1)[None, None]
    states, _ = language(language.embed(ids), bias, torch.arange(4)[None])
    with torch.no_grad():
        torch.testing.assert_close(language.logits(states), qwen[1](ids).logits, rtol=1e-4, atol=1e-4)


def test_image_tokens_take_spare_rows_and_both_tokenizers_come_along(built, tmp_path):
    tokenizer = built.text_tokenizer
    ids = [tokenizer.convert_tokens_to_ids(token) for token in ("<img>", "<IMG_CONTEXT>", "</img>")]
    assert ids == [10, 11, 12] and built.model.config.text.image_token_id == 11
    save_dualtoken(built, tmp_path / "model")
    again = load_dualtoken(tmp_path / "model")
    assert again.tower_tokenizer.convert_tokens_to_ids("star") == 10
    assert again.text_tokenizer.convert_tokens_to_ids("<img>") == 10
    own = built.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in again.model.state_dict().items())


def test_control_tokens_of_the_llm_and_of_images_are_refused_in_prompts(qwen, tmp_path):
    """The image tokens come beside Qwen's own special tokens, not in their place."""
    from spar.checkpoints.formats.text_tokenizer import open_text_tokenizer
    from spar.checkpoints.from_dualtoken import with_image_tokens
    from spar.processing.prompts import PromptEncoder

    own = words(eos_token="<|im_end|>", extra_special_tokens=["<|im_start|>"])
    own.save_pretrained(tmp_path)
    tokenizer = with_image_tokens(open_text_tokenizer(tmp_path), tmp_path)
    tokenizer.save_pretrained(tmp_path / "again")
    for one in (tokenizer, open_text_tokenizer(tmp_path / "again")):
        assert {"<|im_start|>", "<|im_end|>", "<img>", "<IMG_CONTEXT>", "</img>"} <= set(one.all_special_tokens)
        for token in ("<|im_start|>", "<IMG_CONTEXT>"):
            with pytest.raises(InputError, match="control tokens"):
                PromptEncoder(one, 4).check(f"a red {token} circle", "prompt", 64)


def test_the_manifest_says_what_is_published_and_what_is_random(built):
    parts = built.manifest["parts"]
    assert {parts["tokenizer.encoder"], parts["tokenizer.text_tower"]} == {"vision"} and parts["language"] == "llm"
    random = {"tokenizer.reduce_pixel", "tokenizer.decoder", "embedder", "pixel_head", "semantic_head"}
    assert all(parts[name] == "random weights of seed 0" for name in random)
    assert set(built.manifest["sources"]) == {"vision", "llm"}
    assert any("text.hidden_size" in line or "vocab_size" in line for line in built.manifest["differences"])


def test_random_parts_depend_on_the_seed_alone(built, siglip, qwen):
    sources = {"vision": str(siglip[0]), "llm": str(qwen[0])}
    same, other = (build_dualtoken(settings(), CodeSampling(), sources, seed=seed).model for seed in (0, 1))
    own = built.model.state_dict()
    assert all(torch.equal(own[key], value) for key, value in same.state_dict().items())
    assert not torch.equal(own["embedder.pixel.0.weight"], other.state_dict()["embedder.pixel.0.weight"])
    assert torch.isfinite(torch.stack([value.float().sum() for value in own.values()])).all()


def test_an_llm_without_spare_rows_is_refused(siglip, tmp_path, foreign):
    config = Qwen2Config(
        vocab_size=12, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, eos_token_id=2, pad_token_id=0, bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    foreign.randomize(Qwen2ForCausalLM(config)).save_pretrained(tmp_path)
    words(eos_token="<|im_end|>").save_pretrained(tmp_path)
    said = "rows of word embeddings: expected at least 13 for this tokenizer, got 12: its token '</img>' has number 12"
    with pytest.raises(InputError, match=said):
        build_dualtoken(settings(), CodeSampling(), {"vision": str(siglip[0]), "llm": str(tmp_path)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "siglip2"}, "model_type: expected 'siglip', got 'siglip2'"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act: expected 'gelu_pytorch_tanh', got 'relu'"),
    ],
)
def test_a_tower_of_another_form_is_refused(siglip, qwen, tmp_path, change, message):
    config = json.loads((siglip[0] / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    for file in siglip[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=re.escape(message)):
        build_dualtoken(settings(), CodeSampling(), {"vision": str(tmp_path), "llm": str(qwen[0])})


# ---- the public tokenizer --------------------------------------------------------------------------------------------


def public(state: dict[str, torch.Tensor], levels: int, depth: dict[str, int]) -> dict[str, torch.Tensor]:
    """A tokenizer's weights under the public names (rules written apart from the importer's)."""
    out = {"siglip_model.logit_scale": torch.zeros(1), "siglip_model.logit_bias": torch.zeros(1)}
    projections = {
        "reduce_semantic": "prequant_sem", "reduce_pixel": "prequant_pix", "reduce_shortcut": "prequant_shortcut",
        "expand_semantic": "postquant_sem", "decoder.expand": "postquant_pix",
    }  # fmt: skip
    for key, value in state.items():
        value = value.clone()
        if key.startswith("encoder.network."):
            out["siglip_model.vision_model." + key[16:]] = value
        elif key.startswith("text_tower.network."):
            out["siglip_model.text_model." + key[19:]] = value
        elif key.startswith(tuple(projections)):
            ours = next(name for name in projections if key.startswith(name + "."))
            name = projections[ours]
            out[name + key[len(ours) :]] = value
            if key.endswith("attn.q_bias"):
                out[f"{name}.attn.zero_k_bias"] = torch.zeros_like(value)
        elif "_quantizer." in key:
            kind, end = key.split("_quantizer.")
            theirs = {"codebook": "weight", "counts": "cluster_size_ema", "sums": "embed_ema"}[end]
            table = torch.cat([value[0], value.new_zeros(1, value.shape[2])]) if end == "codebook" else value[0]
            for number in range(depth[kind]):
                short = {"pixel": "pix", "semantic": "sem"}[kind]
                out[f"quantizer_{short}.codebooks.{number}.{theirs}"] = table.clone()
        elif key.startswith("decoder.block."):
            out["post_quant_conv." + key[14:].replace("shortcut.", "nin_shortcut.")] = value
        else:
            out[public_decoder(key.removeprefix("decoder.network."), levels)] = spatial(key, value)
    return out


def spatial(key: str, value: torch.Tensor) -> torch.Tensor:
    """VQGAN's attention has 1 x 1 convolutions where diffusers has linear maps."""
    linear = ".attentions." in key and "group_norm" not in key and value.dim() == 2
    return value[:, :, None, None] if linear else value


def public_decoder(key: str, levels: int) -> str:
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
             "conv_shortcut": "nin_shortcut"}  # fmt: skip
    for ours, theirs in names.items():
        key = key.replace(f".{ours}.", f".{theirs}.")
    key = key.replace("conv_norm_out", "norm_out")
    parts = key.split(".")
    if parts[0] == "mid_block":
        kind = {"resnets": "block", "attentions": "attn"}[parts[1]]
        return f"decoder.mid.{kind}_{int(parts[2]) + 1}." + ".".join(parts[3:])
    if parts[0] == "up_blocks":
        level = levels - 1 - int(parts[1])
        if parts[2] == "upsamplers":
            return f"decoder.up.{level}.upsample." + ".".join(parts[4:])
        kind = {"resnets": "block", "attentions": "attn"}[parts[2]]
        return f"decoder.up.{level}.{kind}." + ".".join(parts[3:])
    return f"decoder.{key}"


CONFIG = {
    "hidden_size": 32, "model_type": "rqvaesigliptransformer_model",
    "rqvaesiglip": {
        "layer_recon": 3, "layer_sem": 8, "layer_shortcut": 2, "weight_shortcut": 0.5, "hidden_size": 32,
        "ddconfig": {"attn_resolutions": [12], "ch": 32, "ch_mult": [1, 1, 2], "decoder_in_channels": 64,
                     "double_z": False, "dropout": 0.0, "num_res_blocks": 1, "resolution": 48},
        "decoder_latent_shape": [12, 12],
        "vq_sem": {"code_shape": [4, 4, 2], "n_embed": 20, "embed_dim": 8, "decay": 0.98, "shared_codebook": True},
        "vq_pix": {"code_shape": [4, 4, 3], "n_embed": 16, "embed_dim": 8, "decay": 0.99, "shared_codebook": True},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, siglip, foreign):
    """A random tokenizer of the public form, with taps of its own, and the file that its training would write."""
    base = settings()
    config = DualTokenConfig(
        vision=VisionTowerConfig(
            hidden_size=32, layers=9, heads=2, intermediate_size=48, patch_size=12, image_size=48, shortcut_layer=2,
            pixel_layer=3, semantic_layer=8,
        ),
        text_tower=base.text_tower.__class__(
            vocab_size=40, hidden_size=32, layers=2, heads=2, intermediate_size=48, positions=8
        ),
        pixel=QuantizerConfig(depth=3, entries=16, width=8, codebook="shared"),
        semantic=QuantizerConfig(depth=2, entries=20, width=8, codebook="shared", decay=0.98),
        shortcut=0.5, decoder=base.decoder, text=base.text,
    )  # fmt: skip
    tokenizer = foreign.randomize(DualTokenizer(config))
    for quantizer in tokenizer.quantizers.values():
        quantizer.codebook.normal_(generator=torch.Generator().manual_seed(2))
        quantizer.counts.uniform_(1, 2)
    folder = tmp_path_factory.mktemp("public")
    tensors = public(tokenizer.state_dict(), 3, {"pixel": 3, "semantic": 2})
    torch.save({"epoch": 3, "name": "run", "state_dict": tensors}, folder / "epoch_3.pt")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder, tokenizer, tensors


def convert(checkpoint, siglip, qwen, path=None):
    sources = {"vision": str(siglip[0]), "llm": str(qwen[0])}
    return convert_dualtoken(str(path or checkpoint[0]), settings(), CodeSampling(), sources)


def test_a_converted_tokenizer_is_the_same_function(checkpoint, siglip, qwen):
    bundle, tokenizer = convert(checkpoint, siglip, qwen), checkpoint[1]
    pixels = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    own, wanted = bundle.model.tokenizer(pixels), tokenizer(pixels)
    for name in ("pixel", "semantic"):
        assert torch.equal(own.quantized[name].codes, wanted.quantized[name].codes)
    torch.testing.assert_close(own.pooled, wanted.pooled)
    codes = bundle.model.tokenizer.encode(pixels)
    torch.testing.assert_close(bundle.model.tokenizer.decode(codes.pixel), tokenizer.decode(codes.pixel))
    for key, value in tokenizer.state_dict().items():
        assert torch.equal(bundle.model.tokenizer.state_dict()[key], value), key
    assert bundle.manifest["parts"]["tokenizer"] == "dualtoken"
    assert bundle.model.config.semantic.decay == 0.98 and bundle.model.config.vision.taps == (2, 3, 8)


def test_the_manifests_name_every_file_that_was_read_and_no_other(checkpoint, siglip, qwen, tmp_path, opened):
    for name, (folder, *_) in {"vision": siglip, "llm": qwen, "public": checkpoint}.items():
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text("{}")
    sources, known = {name: str(tmp_path / name) for name in ("vision", "llm")}, (settings(), CodeSampling())
    beside = tmp_path / "settings.json"
    (tmp_path / "public" / "config.json").rename(beside)
    made = {}
    for verb, path in (("build", ()), ("convert", (str(tmp_path / "public"),))):
        with opened(tmp_path) as names:
            if path:
                found = convert_dualtoken(*path, *known, sources, settings=str(beside)).manifest["sources"]
            else:
                found = build_dualtoken(*known, sources).manifest["sources"]
        places = {"vision": "vision/", "llm": "llm/", "dualtoken": "public/", "settings": ""}
        assert {f"{places[name]}{file}" for name, record in found.items() for file in record["sha256"]} == names
        made[verb] = names
    assert made["build"] - made["convert"] == {"vision/model.safetensors"}
    assert made["convert"] - made["build"] == {"public/epoch_3.pt", "settings.json"}
    assert {"vision/config.json", "vision/tokenizer.json", "llm/config.json", "llm/tokenizer.json"} < made["build"]


def test_safetensors_are_read_too(checkpoint, siglip, qwen, tmp_path):
    save_file(checkpoint[2], tmp_path / "tokenizer.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    bundle = convert(checkpoint, siglip, qwen, tmp_path / "tokenizer.safetensors")
    assert torch.equal(bundle.model.tokenizer.pixel_quantizer.codebook, checkpoint[1].pixel_quantizer.codebook)
    assert load_file(tmp_path / "tokenizer.safetensors").keys() == checkpoint[2].keys()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("prequant_pix.norm3.bias"), "1 missing (tokenizer.reduce_pixel.norm3.bias)"),
        (lambda t: t.update({"prequant_visual.norm1.weight": torch.zeros(3)}), "unexpected"),
        (lambda t: t["decoder.conv_in.bias"].fill_(torch.nan), "expected finite weights, got decoder.conv_in.bias"),
        (lambda t: t["postquant_sem.attn.zero_k_bias"].add_(1), "expected zeros in postquant_sem.attn.zero_k_bias"),
        (lambda t: t["quantizer_pix.codebooks.2.weight"].add_(1), "expected one codebook at every depth"),
        (lambda t: t.update({"decoder.conv_in.weight": torch.zeros(2, 2)}), "decoder.network.conv_in.weight is (2, 2)"),
    ],
)
def test_what_does_not_fit_is_named(checkpoint, siglip, qwen, tmp_path, spoil, message):
    tensors = {key: value.clone() for key, value in checkpoint[2].items()}
    spoil(tensors)
    save_file(tensors, tmp_path / "tokenizer.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(InputError, match=re.escape(message)):
        convert(checkpoint, siglip, qwen, tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("vq_pix", "shared_codebook"), False, "shared_codebook: expected True, got False"),
        (("vq_sem", "code_shape"), [16, 16], "code_shape: expected rows, columns and depth, got [16, 16]"),
        (("ddconfig", "attn_resolutions"), [12, 24], "expected attention at the decoder's own square grid [12, 12]"),
    ],
)
def test_a_form_that_ours_has_not_is_refused(checkpoint, siglip, qwen, tmp_path, place, value, message):
    config = json.loads(json.dumps(CONFIG))
    config["rqvaesiglip"][place[0]][place[1]] = value
    save_file(checkpoint[2], tmp_path / "tokenizer.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=re.escape(message)):
        convert(checkpoint, siglip, qwen, tmp_path)


def test_the_full_size_has_as_many_names_as_the_released_classes_list():
    """1226 names at 256 pixels, 1250 at 384, in the groups that `state_dict()` of the released classes has."""
    for name, total, repeated in (("dualtoken-3b-256", 1226, 12), ("dualtoken-3b", 1250, 24)):
        config = recipe(name).model
        with torch.device("meta"):
            tokenizer = DualTokenizer(config)
        names = public(tokenizer.state_dict(), 5, {"pixel": config.pixel.depth, "semantic": config.semantic.depth})
        groups = {}
        for key in names:
            groups[key.split(".")[0]] = groups.get(key.split(".")[0], 0) + 1
        assert groups == {
            "siglip_model": 888, "prequant_sem": 22, "prequant_pix": 22, "prequant_shortcut": 22, "postquant_sem": 22,
            "postquant_pix": 22, "quantizer_sem": repeated, "quantizer_pix": repeated, "post_quant_conv": 10,
            "decoder": 194,
        }  # fmt: skip
        assert len(names) == total
        shapes = {key: tuple(value.shape) for key, value in names.items()}
        assert shapes["quantizer_pix.codebooks.0.weight"] == (16385, 32)
        assert shapes["decoder.up.3.block.0.nin_shortcut.weight"] == (512, 1024, 1, 1)
        assert shapes["decoder.up.4.attn.2.q.weight"] == (1024, 1024, 1, 1)
        assert shapes["prequant_pix.attn.qkv.weight"] == (3456, 1152)


def test_the_parts_of_the_full_size_have_the_published_numbers_of_parameters():
    with torch.device("meta"):
        tokenizer = DualTokenizer(recipe("dualtoken-3b-256").model)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in tokenizer.named_children()}
    assert counts["encoder"] == 427_888_064 and counts["text_tower"] == 707_782_896
    assert counts["reduce_pixel"] == counts["reduce_semantic"] == counts["reduce_shortcut"] == 4_032_608
    assert counts["expand_semantic"] == 9_452_288
    assert counts["decoder"] == 9_452_288 + 11_803_904 + 168_449_667
    assert tokenizer.pixel_quantizer.codebook.numel() == 524_320 - 32         # without the padding row


# ---- the commands ----------------------------------------------------------------------------------------------------


def test_the_commands_make_a_model(siglip, qwen, checkpoint, tmp_path, capsys, monkeypatch):
    from spar.recipes import RECIPES
    from spar.training.systems.dualtoken import DualTokenRecipe

    own = DualTokenRecipe(name="small", model=settings(), stages=recipe("dualtoken-tiny").stages)
    monkeypatch.setitem(RECIPES, "dualtoken-3b", lambda: own)
    parts = ["--vision", str(siglip[0]), "--llm", str(qwen[0])]
    assert main(["build", "dualtoken-3b", *parts, "-o", str(tmp_path / "built")]) == 0
    assert main(["convert", "dualtoken", str(checkpoint[0]), *parts, "-o", str(tmp_path / "converted")]) == 0
    assert "tokenizer: dualtoken" in capsys.readouterr().out
    for name in ("built", "converted"):
        assert load_dualtoken(tmp_path / name).model.config.text.vocab_size == 24


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("build dualtoken-3b --llm x -o out", "expected --vision, a folder or Hub id each, got none"),
        ("build dualtoken-3b --mllm x --vision x --llm x -o out", "--mllm: not for this system"),
        ("build spar-1b --vision x -o out", "--vision: not for this system"),
        ("build spar-1b --mllm x -o out", "expected --autoencoder, --dit, a folder or Hub id each, got none"),
        ("convert dualtoken x --vision x --llm x --router last -o out", "--router: not for this system"),
        ("convert dualtoken x --recipe spar-1b -o out", "expected a recipe of dualtoken, got spar-1b"),
        ("convert unilip x --recipe dualtoken-3b -o out", "expected a recipe of spar, got dualtoken-3b"),
    ],
)
def test_sources_of_the_other_system_are_refused(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err
