import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spar.losses.alignment import alignment_loss, match_grid


def features(seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(seed)) + mean


@given(scale=st.floats(0.01, 100))
def test_the_teacher_itself_at_any_scale_is_the_minimum(scale):
    assert alignment_loss(scale * features(), features())["loss"].item() == pytest.approx(-1, abs=1e-5)
    assert alignment_loss(-scale * features(), features())["loss"].item() == pytest.approx(1, abs=1e-5)


def test_orthogonal_features_score_zero():
    one = torch.zeros(1, 2, 4)
    one[..., 0] = 3.0
    assert alignment_loss(one, one.roll(1, dims=-1))["loss"] == 0


def test_the_loss_is_minus_the_mean_over_tokens():
    a, b = features(0), features(1)
    by_hand = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    torch.testing.assert_close(alignment_loss(a, b)["loss"], -by_hand.mean())


def test_a_constant_prediction_earns_the_plain_cosine_but_not_the_centred_one():
    teacher = features(mean=5.0)
    constant = teacher.mean(dim=(0, 1)).expand_as(teacher)
    plain = alignment_loss(constant, teacher)
    centred = alignment_loss(constant, teacher, teacher_mean=teacher.mean(dim=(0, 1)))
    assert plain["cosine_plain"] > 0.95 and plain["loss"] == -plain["cosine_plain"]
    assert abs(centred["cosine_centered"]) < 0.2 and centred["loss"] == -centred["cosine_centered"]


def test_the_centred_minimum_is_the_centred_teacher():
    teacher = features(mean=5.0)
    teacher, mean = features(mean=5.0), torch.full((8,), 5.0)
    for part in (teacher, teacher[:1, :1]):
        assert alignment_loss(part - mean, part, teacher_mean=mean)["loss"].item() == pytest.approx(-1, abs=1e-5)


def test_the_plain_cosine_does_not_see_the_mean():
    a, b = features(0), features(1)
    plain = alignment_loss(a, b)["cosine_plain"]
    assert alignment_loss(a, b, teacher_mean=torch.full((8,), 9.0))["cosine_plain"] == plain


@pytest.mark.parametrize("mean", [None, torch.full((8,), 0.1)])
def test_only_the_prediction_gets_a_gradient(mean):
    projected, teacher = features(0).requires_grad_(), features(1).requires_grad_()
    result = alignment_loss(projected, teacher, teacher_mean=mean)
    result.pop("loss").backward()
    assert projected.grad.abs().sum() > 0 and teacher.grad is None
    assert not any(cosine.requires_grad for cosine in result.values())


def test_contradictions_raise():
    with pytest.raises(ValueError, match="projected as a tensor, got None"):
        alignment_loss(None, features())
    with pytest.raises(ValueError, match="teacher as a tensor, got None"):
        alignment_loss(features(), None)
    with pytest.raises(ValueError, match="one shape"):
        alignment_loss(features(), features()[:1])
    with pytest.raises(ValueError, match="teacher_mean of shape"):
        alignment_loss(features(), features(), teacher_mean=torch.zeros(3))


def test_an_equal_grid_is_the_tensor_itself():
    x = features()
    assert match_grid(x, source=(2, 3), target=(2, 3)) is x


def test_a_halved_grid_is_the_mean_over_cells():
    grid = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0))  # [B, h, w, D]
    halved = match_grid(grid.reshape(2, 24, 5), source=(4, 6), target=(2, 3))
    cells = grid.reshape(2, 2, 2, 3, 2, 5).mean(dim=(2, 4)).reshape(2, 6, 5)
    torch.testing.assert_close(halved, cells)


def test_rows_and_columns_are_kept_apart():
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), indexing="ij")
    tokens = torch.stack([rows, columns], dim=-1).reshape(1, 32, 2)
    halved = match_grid(tokens, source=(4, 8), target=(2, 4)).reshape(2, 4, 2)
    torch.testing.assert_close(halved[..., 0], torch.tensor([0.5, 2.5])[:, None].expand(2, 4))
    torch.testing.assert_close(halved[..., 1], torch.tensor([0.5, 2.5, 4.5, 6.5]).expand(2, 4))


def test_a_doubled_grid_interpolates_at_pixel_centres():
    doubled = match_grid(torch.tensor([0.0, 4.0]).reshape(1, 2, 1), source=(1, 2), target=(1, 4))
    torch.testing.assert_close(doubled.flatten(), torch.tensor([0.0, 1.0, 3.0, 4.0]))


def test_a_grid_that_does_not_hold_the_tokens_raises():
    with pytest.raises(ValueError, match=r"2 x 2 = 4 tokens, got 6"):
        match_grid(features(), source=(2, 2), target=(1, 1))
