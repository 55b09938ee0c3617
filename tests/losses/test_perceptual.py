import sys
import types

import pytest
import torch
from torch import nn

from spar.common.errors import InputError
from spar.losses.perceptual import IMAGENET_MEAN, ConvNextLoss, FeatureLoss, LpipsLoss, PerceptualLoss, unit_normalize


def pictures(seed: int = 0, side: int = 16) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


class TwoMaps(nn.Module):
    """A small network with dropout, so that a wrong mode shows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.dropout = nn.Dropout(0.5)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        first = self.first(x).relu()
        return [first, self.second(self.dropout(first))]


def test_unit_normalisation_gives_unit_vectors_and_a_finite_gradient_at_zero():
    x = torch.randn(2, 5, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(unit_normalize(x).norm(dim=1), torch.ones(2, 3, 3))
    torch.testing.assert_close(unit_normalize(7 * x), unit_normalize(x))
    zero = torch.zeros(1, 5, 1, 1, requires_grad=True)
    unit_normalize(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_equal_images_have_no_distance_and_opposite_features_four():
    loss = FeatureLoss(TwoMaps())
    assert loss(pictures(), pictures()) == 0
    assert loss(pictures(0), pictures(1)) > 0
    signed = FeatureLoss(lambda x: [x - 0.5])
    torch.testing.assert_close(signed(torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)), torch.tensor(4.0))


def test_it_is_the_mean_over_the_layers():
    a, b, network = pictures(0), pictures(1), TwoMaps().eval()
    both = FeatureLoss(network)(a, b)
    first, second = (FeatureLoss(lambda x, layer=layer: [network(x)[layer]])(a, b) for layer in (0, 1))
    assert first != second
    torch.testing.assert_close(both, (first + second) / 2)


def test_the_scale_of_features_does_not_matter():
    network = TwoMaps().eval()
    scaled = FeatureLoss(lambda x: [10 * m for m in network(x)])
    torch.testing.assert_close(scaled(pictures(0), pictures(1)), FeatureLoss(network)(pictures(0), pictures(1)))


def test_descending_it_brings_the_prediction_closer():
    loss, target = FeatureLoss(TwoMaps()), pictures(1)
    prediction = pictures(0).requires_grad_()
    before = loss(prediction, target)
    (gradient,) = torch.autograd.grad(before, prediction)
    assert loss(prediction - gradient, target) < before


def test_the_target_and_the_network_get_no_gradient():
    loss, target = FeatureLoss(TwoMaps()), pictures(1).requires_grad_()
    prediction = pictures(0).requires_grad_()
    loss(prediction, target).backward()
    assert prediction.grad.abs().sum() > 0 and target.grad is None


def test_it_stays_in_evaluation_mode_inside_a_training_module():
    parent = nn.ModuleDict({"loss": FeatureLoss(TwoMaps())}).train()
    values = {parent["loss"](pictures(0), pictures(1)).item() for _ in range(3)}
    assert len(values) == 1 and not parent["loss"].network.dropout.training


def test_contradictions_raise():
    with pytest.raises(ValueError, match="trainable parameter network.first.weight"):
        FeatureLoss(TwoMaps().requires_grad_(True))(pictures(), pictures())
    with pytest.raises(ValueError, match="feature maps"):
        FeatureLoss(lambda x: [])(pictures(), pictures())
    with pytest.raises(ValueError, match="one shape"):
        FeatureLoss(TwoMaps())(pictures(), pictures(side=12))
    with pytest.raises(NotImplementedError):
        PerceptualLoss()(pictures(), pictures())


def test_lpips_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match="pip install lpips"):
        LpipsLoss.load()


def test_lpips_gets_images_in_its_own_range(monkeypatch):
    class Fake(nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            self.net, self.scale = net, nn.Parameter(torch.ones(()))

        def forward(self, a, b):
            assert (a.min(), a.max()) == (-1, 1) and b.abs().max() == 0
            return self.scale * (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Fake))
    loss = LpipsLoss.load("alex")
    black_and_white = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert loss(black_and_white, torch.full_like(black_and_white, 0.5)) == 1
    assert loss.network.net == "alex"


@pytest.fixture(scope="module")
def convnext_folder(tmp_path_factory):
    from transformers import ConvNextConfig, ConvNextForImageClassification

    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, num_labels=5, image_size=16)
    config.layer_scale_init_value = 1.0
    folder = tmp_path_factory.mktemp("convnext")
    ConvNextForImageClassification(config).save_pretrained(folder)
    return folder


def test_convnext_is_the_mean_square_of_its_logits(convnext_folder):
    loss = ConvNextLoss.load(convnext_folder, side=16)
    grey = torch.tensor(IMAGENET_MEAN).reshape(1, 3, 1, 1).expand(2, 3, 16, 16)
    seen = loss.model(pixel_values=(pictures() - loss.mean) / loss.std).logits
    at_zero = loss.model(pixel_values=torch.zeros(2, 3, 16, 16)).logits
    value = loss(pictures(), grey)
    assert value > 0
    torch.testing.assert_close(value, (seen - at_zero).square().mean())
    assert loss(pictures(), pictures()) == 0


def test_convnext_resizes_to_its_side_and_lets_the_gradient_through(convnext_folder):
    loss = ConvNextLoss.load(convnext_folder, side=16)
    prediction = pictures(0, side=32).requires_grad_()
    loss(prediction, pictures(1, side=32)).backward()
    assert prediction.grad.abs().sum() > 0
    flat = torch.full((1, 3, 32, 32), 0.25)
    torch.testing.assert_close(loss._logits(flat), loss._logits(flat[..., :16, :16]))


def test_convnext_from_nowhere_says_what_was_expected(tmp_path):
    with pytest.raises(InputError, match="a ConvNeXt classifier .* is expected at"):
        ConvNextLoss.load(tmp_path / "missing")
