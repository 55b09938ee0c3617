import pytest
import torch
from transformers import InternVLConfig, InternVLModel, InternVLVisionConfig, Qwen2Config

from spar.models.config import VisionConfig
from spar.models.encoder import SemanticEncoder, internvl_config, merge_patches, vision_config

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)  # ImageNet's, as InternVL's image processor has them
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def pixels(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def reference(config, randomize) -> InternVLModel:
    """The library's model, configured by hand as the published checkpoints are."""
    vision, text = config.vision, config.text
    return randomize(
        InternVLModel(
            InternVLConfig(
                vision_config=InternVLVisionConfig(
                    hidden_size=vision.hidden_size, num_hidden_layers=vision.layers,
                    num_attention_heads=vision.heads, intermediate_size=vision.intermediate_size,
                    image_size=(vision.image_size,) * 2, patch_size=(vision.patch_size,) * 2, attention_bias=True,
                ),
                text_config=Qwen2Config(
                    hidden_size=text.hidden_size, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1,
                    vocab_size=8, intermediate_size=8,
                ),
            )
        )
    )


@pytest.mark.parametrize("learning", [False, True])  # each has its own form of attention
@pytest.mark.parametrize("side", [32, 48])  # 48: the position embeddings are interpolated
def test_visual_tokens_equal_those_of_the_library(config, reference, learning, side):
    encoder = SemanticEncoder(config.vision, config.text).eval().requires_grad_(learning)
    encoder.vision_tower.load_state_dict(reference.vision_tower.state_dict())
    encoder.multi_modal_projector.load_state_dict(reference.multi_modal_projector.state_dict())
    image = pixels(2, 3, side, side)
    wanted = reference.get_image_features((image - MEAN) / STD).pooler_output
    f_v = encoder(image)
    assert f_v.requires_grad == learning
    assert f_v.shape == (2, (side // 8) ** 2, config.text.hidden_size)
    torch.testing.assert_close(f_v, wanted, rtol=1e-4, atol=1e-5)


def test_the_configuration_is_that_of_the_published_checkpoints(config):
    """What `VisionConfig` leaves out is fixed: layer norm, GELU, no CLS pooling, biases, the last layer's features."""
    built = vision_config(VisionConfig(layer_scale=0.1))
    whole = internvl_config(config.vision, config.text)
    assert (built.attention_bias, built.use_qk_norm) == (True, False)
    assert (built.norm_type, built.hidden_act) == ("layer_norm", "gelu")
    assert (built.layer_scale_init_value, built.layer_norm_eps, built.use_mean_pooling) == (0.1, 1e-6, True)
    assert (whole.downsample_ratio, whole.vision_feature_layer, whole.image_seq_length) == (0.5, -1, config.grid**2)
    assert whole.image_token_id == config.text.image_token_id


def test_the_library_accepts_the_encoders_weights_by_name(config, reference):
    encoder = SemanticEncoder(config.vision, config.text)
    own = {name: value.shape for name, value in encoder.state_dict().items()}
    theirs = {
        name: value.shape
        for name, value in reference.state_dict().items()
        if name.startswith(("vision_tower.", "multi_modal_projector."))
    }
    assert own == theirs


@pytest.mark.parametrize(("height", "width"), [(4, 4), (2, 6)])
def test_merging_patches_is_the_librarys_pixel_shuffle(reference, height, width):
    features = torch.arange(2.0 * height * width * 3).view(2, height * width, 3)
    shuffled = reference.pixel_shuffle(features.view(2, height, width, 3), scale_factor=0.5)
    assert torch.equal(merge_patches(features, height, width), shuffled.reshape(2, height * width // 4, 12))


def test_a_merged_token_holds_its_square_row_by_row():
    places = torch.arange(16.0).view(1, 16, 1)  # a 4x4 grid of patches that know their place
    assert merge_patches(places, 4, 4)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
