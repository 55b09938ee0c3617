"""`spar export internvl`: transformers' own classes answer as SPAR does, and the folder can be built from again."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from spar.checkpoints.from_published import build_from_published
from spar.checkpoints.spar_format import ModelBundle, SamplingConfig, load_model
from spar.checkpoints.to_internvl import export_internvl
from spar.cli.main import main
from spar.common.errors import InputError
from spar.inference.pipeline import BUNDLED, SparPipeline
from spar.models.config import (
    ConnectorConfig,
    DenoiserConfig,
    RouterConfig,
    SparConfig,
    StreamConfig,
    TextConfig,
    UnderstandingConfig,
)
from spar.processing.prompts import PromptEncoder
from spar.worlds.shapes.dataset import scene_at
from spar.worlds.shapes.render import render

CONFIG = SparConfig(  # what a recipe says beside the parts, at this size
    text=TextConfig(layers=4, hidden_size=32, heads=4, kv_heads=2),
    streams=StreamConfig(residual_blocks=1, pixel_layers=1, pixel_heads=2), router=RouterConfig(count=2),
    connector=ConnectorConfig(queries=3, layers=2), denoiser=DenoiserConfig(layers=2, align_depth=2),
    understanding=UnderstandingConfig(geometry="stretch"),
)  # fmt: skip


def build(root: Path) -> ModelBundle:
    sources = {part: str(root / part) for part in ("mllm", "autoencoder", "dit")}
    return build_from_published(CONFIG, SamplingConfig(), sources)


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def published(foreign, tmp_path, request) -> Path:
    """One folder a part, as they are published."""
    root = tmp_path / "published"
    foreign.save_hf(foreign.mllm(tied=request.param), root / "mllm")
    foreign.autoencoder().save_pretrained(root / "autoencoder")
    foreign.save_dit(foreign.dit(), root / "dit")
    return root


def test_what_is_exported_is_built_from_again_to_the_bit(published, tmp_path):
    built = build(published)
    export_internvl(built, tmp_path / "out")
    shutil.rmtree(published / "mllm")
    shutil.copytree(tmp_path / "out", published / "mllm")
    again = build(published)
    assert again.model.config == built.model.config
    own = built.model.state_dict()
    same = [torch.equal(value, own[key]) for key, value in again.model.state_dict().items()]
    assert all(same) and len(same) == len(own)


def test_the_library_reads_an_image_as_we_do(published, tmp_path):
    built = build(published)
    export_internvl(built, tmp_path / "out")
    library = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert library.config.tie_word_embeddings == built.model.config.text.tied_head
    processor = GotOcr2ImageProcessorPil.from_pretrained(tmp_path / "out")
    picture = torch.randint(256, (112, 112, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    pixels = processor(picture.numpy(), return_tensors="pt").pixel_values
    f_v = built.model.tokenizer.encoder(picture.permute(2, 0, 1)[None] / 255)
    wanted = library.model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(f_v, wanted, rtol=1e-4, atol=1e-5)


def asked(library, processor, tokenizer, text: str, images: list[Image.Image], **keywords) -> list[int]:
    """The library's own greedy answer, its placeholders written out by the processor's number of tiles."""
    given = processor(images, return_tensors="pt", **keywords)
    for count in given["num_patches"].tolist():
        text = text.replace("<image>", f"<img>{'<IMG_CONTEXT>' * 16 * count}</img>", 1)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    return library.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=given.pixel_values, do_sample=False,
        max_new_tokens=8,
    )[0, ids.shape[1] :].tolist()  # fmt: skip


@pytest.mark.parametrize("published", [True], indirect=True)
def test_answers_are_the_librarys_token_for_token(published, tmp_path):
    """With one square of the whole image, with tiles, and with two images in one conversation."""
    built = build(published)
    export_internvl(built, tmp_path / "out")
    library = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    library.generation_config.eos_token_id = built.model.config.text.eos_token_id
    processor = GotOcr2ImageProcessorPil.from_pretrained(tmp_path / "out")
    pipe = SparPipeline(built, torch.float32, torch.device("cpu"))
    tokenizer = pipe.text_tokenizer
    wide, high = (Image.fromarray(np.random.default_rng(s).integers(0, 256, (*size, 3), np.uint8))
                  for s, size in enumerate(((90, 250), (200, 130))))  # fmt: skip
    question = "how many objects are there?"
    for tiles, keywords in ((1, {}), (6, {"crop_to_patches": True, "max_patches": 6})):
        for images in ([wide], [high], [wide, high]):
            content = [*({"type": "image", "image": one} for one in images), {"type": "text", "text": question}]
            said = list(pipe.chat([{"role": "user", "content": content}], max_new_tokens=8, max_tiles=tiles))
            before = "<image>\n" * len(images)
            text = f"<|im_start|>user\n{before}{question}<|im_end|>\n<|im_start|>assistant\n"
            wanted = asked(library, processor, tokenizer, text, images, **keywords)
            assert "".join(said) == tokenizer.decode(wanted, skip_special_tokens=True) != ""
            if len(images) == 1:
                answer = pipe.understand(images[0], question, max_new_tokens=8, max_tiles=tiles).texts[0]
                assert answer == "".join(said)


def test_the_bundled_model_answers_the_same_in_transformers(tmp_path):
    pipe = SparPipeline.from_pretrained(dtype="float32", device="cpu")
    assert main(["export", "internvl", "spar", "-o", str(tmp_path / "out")]) == 0
    library = InternVLForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = GotOcr2ImageProcessorPil.from_pretrained(tmp_path / "out")
    prompts = PromptEncoder(pipe.bundle.text_tokenizer, pipe.model.config.grid**2)
    for seed, question in enumerate(("describe the image", "what color is the background?")):
        image = render(scene_at("validation", seed))
        tokens = prompts.question([question])
        given = library.generate(
            input_ids=tokens.ids, attention_mask=tokens.mask, do_sample=False, max_new_tokens=40,
            pixel_values=processor(image, return_tensors="pt").pixel_values,
        )[0, tokens.ids.shape[1] :]
        answer = pipe.bundle.text_tokenizer.decode(given, skip_special_tokens=True)
        assert answer.split() == pipe.understand(image, question).texts[0].split() != []


def test_files_types_and_refusals(tiny_run, tmp_path, capsys):
    model, out = tiny_run.path / "model", tmp_path / "out"
    assert main(["export", "internvl", str(model), "-o", str(out), "--dtype", "bfloat16"]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["dtype"]) == ("internvl", "bfloat16")
    names = {"model.safetensors", "tokenizer.json", "preprocessor_config.json", "processor_config.json"}
    assert names <= {path.name for path in out.iterdir()} and [*tmp_path.iterdir()] == [out]
    assert capsys.readouterr().err == ""  # no bar of transformers' in a log
    assert main(["export", "internvl", str(model), "-o", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["export", "internvl", str(model), "-o", str(out), "--overwrite"]) == 0
    for name in ("notes.txt", "preprocessor_config.json"):  # the latter is in every published folder of images
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        assert main(["export", "internvl", str(model), "-o", str(tmp_path / name), "--overwrite"]) == 2
        assert (tmp_path / name / name).read_text() == "mine"
    assert main(["export", "internvl", "dualtoken", "-o", str(tmp_path / "third")]) == 2


def test_weights_that_the_type_does_not_hold_are_not_exported(tmp_path):
    """float16 ends at 65504: a larger weight would be written as infinity."""
    bundle = load_model(BUNDLED)
    bundle.model.language.network.norm.weight.data[0] = 1e5
    with pytest.raises(InputError, match="expected finite weights, got model.language_model.norm.weight .* in float16"):
        export_internvl(bundle, tmp_path / "out", torch.float16)
    assert not [*tmp_path.iterdir()]


def test_a_users_own_folder_beside_an_export_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.old").mkdir()
    (tmp_path / "m.old" / "keep.txt").write_text("x")
    assert main(["export", "internvl", "spar", "-o", "m"]) == 0
    assert (tmp_path / "m.old" / "keep.txt").read_text() == "x"
