import pytest
import torch

from spar.losses.distillation import native_latent_loss, semantic_loss

PAIR = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)).unbind(0)


@pytest.mark.parametrize("loss", [semantic_loss, native_latent_loss])
def test_it_is_the_mean_square_and_teaches_the_student_only(loss):
    student, teacher = (tensor.clone().requires_grad_() for tensor in PAIR)
    value = loss(student, teacher)
    value.backward()
    torch.testing.assert_close(value.detach(), (PAIR[0] - PAIR[1]).square().mean())
    torch.testing.assert_close(student.grad, 2 * (PAIR[0] - PAIR[1]) / PAIR[0].numel())
    assert teacher.grad is None
    assert loss(PAIR[0], PAIR[0]) == 0


@pytest.mark.parametrize(
    "loss, names", [(semantic_loss, ("f_v", "frozen encoder")), (native_latent_loss, ("z_p", "autoencoder"))]
)
def test_a_missing_or_unlike_input_raises_and_is_named(loss, names):
    with pytest.raises(ValueError, match=f"{names[0]} as a tensor, got None"):
        loss(None, PAIR[1])
    with pytest.raises(ValueError, match=f"{names[1]}.* got None"):
        loss(PAIR[0], None)
    with pytest.raises(ValueError, match=f"{names[0]} and .*{names[1]}.* of one shape"):
        loss(PAIR[0], PAIR[1][:1])
