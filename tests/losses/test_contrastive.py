import pytest
import torch

from spar.losses.contrastive import sigmoid_contrastive_loss


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_papers_sum_over_all_pairs():
    images, texts, scale, bias = draw(4, 6), draw(4, 6, seed=1), torch.tensor(1.3), torch.tensor(-2.0)
    wanted = 0.0
    for i in range(4):
        for j in range(4):
            cosine = torch.dot(images[i] / images[i].norm(), texts[j] / texts[j].norm())
            sign = 1.0 if i == j else -1.0
            wanted += torch.log(1 + torch.exp(-sign * (torch.exp(scale) * cosine + bias))) / 4
    torch.testing.assert_close(sigmoid_contrastive_loss(images, texts, scale, bias), wanted)


def test_equal_texts_match_each_others_images():
    images, texts = draw(3, 6), draw(3, 6, seed=1)
    matches = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    both = sigmoid_contrastive_loss(images, texts, torch.tensor(1.0), torch.tensor(0.0), matches)
    plain = sigmoid_contrastive_loss(images, texts, torch.tensor(1.0), torch.tensor(0.0))
    cosines = torch.nn.functional.cosine_similarity(images[:2], texts[[1, 0]])
    # log sigmoid(-z) becomes log sigmoid(z) for the two pairs: each changes by z / B
    torch.testing.assert_close(plain - both, (cosines * torch.e).sum() / 3)


def test_as_many_texts_as_images_are_expected():
    with pytest.raises(ValueError, match=r"got \(3, 6\) and \(2, 6\)"):
        sigmoid_contrastive_loss(draw(3, 6), draw(2, 6), torch.tensor(1.0), torch.tensor(0.0))
