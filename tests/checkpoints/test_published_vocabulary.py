"""The vocabulary as it is published: 151,674 rows of words, a tokenizer of one token more, and UniLIP's three."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

from spar.checkpoints.from_published import build_from_published
from spar.checkpoints.spar_format import SamplingConfig, load_model, save_model
from spar.checkpoints.to_internvl import export_internvl
from spar.common.errors import InputError
from spar.inference.pipeline import SparPipeline
from spar.losses.adversarial import PatchDiscriminatorConfig
from spar.models.config import RouterConfig, SparConfig, TextConfig
from spar.recipes import REGISTRY, recipe
from spar.training.files_data import FilesData
from spar.training.stage_model import load_stage_model
from spar.training.systems.spar import PerceptualConfig
from spar.training.trainer import train

PAPER = recipe("spar-1b").model
CONFIG = SparConfig(
    text=TextConfig(layers=4, hidden_size=32, heads=4, kv_heads=2),
    streams=replace(PAPER.streams, residual_blocks=1, pixel_layers=1, pixel_heads=2),
    router=RouterConfig(count=2),
    connector=replace(PAPER.connector, queries=3, layers=2),
    denoiser=replace(PAPER.denoiser, layers=2, align_depth=2, self_attention="softmax"),
    understanding=PAPER.understanding,
)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def published(request, foreign, tmp_path_factory):
    """The three parts, the LLM with all rows of words in two shards, and what the library says of a text."""
    root = tmp_path_factory.mktemp("published")
    library = foreign.mllm(tied=request.param, rows=foreign.INTERN_ROWS)
    foreign.save_hf(library, root / "mllm", shard="12MB")
    assert len(list((root / "mllm").glob("model-*.safetensors"))) > 1
    foreign.autoencoder().save_pretrained(root / "autoencoder")
    foreign.save_dit(foreign.dit(), root / "dit")
    return root, library


@pytest.fixture(scope="module")
def built(published, tmp_path_factory):
    root, library = published
    sources = {part: str(root / part) for part in ("mllm", "autoencoder", "dit")}
    bundle = build_from_published(CONFIG, SamplingConfig(shift=3.0, max_prompt_tokens=300), sources)
    folder = tmp_path_factory.mktemp("built") / "model"
    save_model(bundle, folder)
    return folder, library


def test_the_tokenizer_has_one_token_more_than_rows_and_every_special_token_its_place(built):
    bundle = load_model(built[0])
    tokenizer, text = bundle.text_tokenizer, bundle.model.config.text
    assert (len(tokenizer), text.vocab_size) == (151_675, 151_674)
    places = {
        "<|im_start|>": 151_644, "<img>": 151_665, "</img>": 151_666, "<IMG_CONTEXT>": 151_667, "<video>": 151_674
    }  # fmt: skip
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in places} == places
    assert (text.image_token_id, text.eos_token_id, text.pad_token_id) == (151_667, 151_645, 151_643)
    words = "a red circle\n to the left"
    assert tokenizer.decode(tokenizer.encode(words)) == words and max(tokenizer.encode(words)) < 151_643


def test_it_answers_with_the_librarys_words_draws_and_refuses_a_token_without_a_row(built):
    folder, library = built
    pipe = SparPipeline.from_pretrained(folder, dtype=torch.float32, device="cpu")
    picture = Image.effect_noise((112, 112), 60).convert("RGB")
    said = pipe.understand(picture, "what is it?", max_new_tokens=6).texts[0]
    tokens = pipe.prompts.question(["what is it?"]).ids
    pixels = torch.tensor(list(picture.tobytes())).view(112, 112, 3).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(one).view(1, 3, 1, 1) for one in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    wanted = library.generate(
        input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=(pixels - mean) / std, max_new_tokens=6,
        do_sample=False, eos_token_id=151_645, pad_token_id=151_643,
    )[0, tokens.shape[1] :]
    assert said == pipe.text_tokenizer.decode(wanted, skip_special_tokens=True)
    assert pipe.generate("a red circle", num_inference_steps=1, seed=0).images[0].size == (112, 112)
    with pytest.raises(InputError, match="control tokens"):
        pipe.generate("a red <video>", num_inference_steps=1)


def test_a_stage_is_trained_from_it_and_the_head_survives(built, tmp_path):
    folder, library = built
    (tmp_path / "own").mkdir()
    for number in range(2):
        Image.effect_noise((120, 112), 60).convert("RGB").save(tmp_path / "own" / f"{number}.png")
        (tmp_path / "own" / f"{number}.txt").write_text("a grey picture, <b>noisy</b>")
    base = recipe("spar-1b")
    stage = replace(base.stages[0], steps=1, batch=2, warmup=0)
    own = replace(
        base, model=load_model(folder).model.config, stages=(stage,), published=(),
        data=FilesData(sets=(str(tmp_path / "own"),), workers=0), alignment=replace(base.alignment, hidden=8),
        perceptual=PerceptualConfig(autoencoder=1.0), discriminator=PatchDiscriminatorConfig(width=8, layers=1),
    )  # fmt: skip
    assert train(own, tmp_path / "run", init_from=folder, device="cpu") is not None
    for model in (load_stage_model(tmp_path / "run", REGISTRY).model, load_model(tmp_path / "run" / "model").model):
        words = library.model.language_model.embed_tokens.weight
        assert torch.equal(model.language.network.embed_tokens.weight, words)
        head = model.language.head
        assert (head is None) == (library.lm_head.weight is words)
        assert head is None or torch.equal(head.weight, library.lm_head.weight)


def test_it_leaves_as_the_folder_that_it_came_from(published, built, tmp_path):
    export_internvl(load_model(built[0]), tmp_path / "out")
    again = type(published[1]).from_pretrained(tmp_path / "out")
    for (name, value), other in zip(published[1].state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
