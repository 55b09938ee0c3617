import pytest
import torch

from spar.losses.adversarial import (
    ContiguousGroupNorm,
    LeCam,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    discriminator_hinge_loss,
    generator_hinge_loss,
)

SMALL = PatchDiscriminatorConfig(width=8, layers=2)


def pictures(seed: int = 0, side: int = 24) -> torch.Tensor:
    return torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(seed))


def discriminator(config: PatchDiscriminatorConfig = SMALL) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(config)


def test_the_hinge_rests_beyond_the_margin_and_is_one_at_zero():
    assert discriminator_hinge_loss(torch.full((4,), 1.5), torch.full((4,), -1.0)) == 0
    assert discriminator_hinge_loss(torch.zeros(4), torch.zeros(4)) == 1
    assert discriminator_hinge_loss(torch.full((4,), -1.0), torch.full((4,), 2.0)) == 0.5 * (2 + 3)


def test_the_generator_wants_high_logits():
    logits = torch.tensor([1.0, -3.0], requires_grad=True)
    loss = generator_hinge_loss(logits)
    loss.backward()
    assert loss == 1
    torch.testing.assert_close(logits.grad, torch.tensor([-0.5, -0.5]))


def test_lecam_anchors_are_moving_averages_that_the_first_batch_sets():
    lecam = LeCam(decay=0.9)
    lecam(torch.tensor([1.0, 3.0]), torch.tensor([-1.0]))
    assert (lecam.real, lecam.fake) == (2, -1)
    lecam(torch.tensor([4.0]), torch.tensor([1.0]))
    torch.testing.assert_close(torch.stack([lecam.real, lecam.fake]), torch.tensor([2.2, -0.8]))


def test_lecam_has_its_closed_form_and_evaluation_keeps_the_anchors():
    lecam = LeCam()
    lecam(torch.tensor([2.0]), torch.tensor([-1.0]))
    lecam.eval()
    real, fake = torch.tensor([3.0, -2.0], requires_grad=True), torch.tensor([0.0, 5.0], requires_grad=True)
    value = lecam(real, fake)
    assert value == (4**2 + 0) / 2 + (2**2 + 0) / 2
    value.backward()
    assert real.grad.tolist() == [4, 0] and fake.grad.tolist() == [-2, 0]
    assert (lecam.real, lecam.fake, lecam.updates) == (2, -1, 1)


def test_lecam_resumes_from_its_state():
    first, second = LeCam(decay=0.9), LeCam(decay=0.9)
    batches = torch.randn(4, 2, 5, generator=torch.Generator().manual_seed(0))
    for real, fake in batches[:2]:
        first(real, fake)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(first(real, fake), second(real, fake)) for real, fake in batches[2:])


def test_a_logit_sees_its_own_image_and_patch_only():
    model = discriminator()
    images = pictures(side=64)
    logits = model(images)
    torch.testing.assert_close(logits[:1], model(images[:1]))
    changed = images.clone()
    changed[0, :, :8, :8] = 1 - changed[0, :, :8, :8]
    assert not torch.allclose(logits[0, 0, 0, 0], model(changed)[0, 0, 0, 0])
    images.requires_grad_()
    model.eval()
    # Through the convolutions alone (norms taken out), the far corner is out of a patch's sight.
    for i, layer in enumerate(model.layers):
        if isinstance(layer, ContiguousGroupNorm):
            model.layers[i] = torch.nn.Identity()
    model(images)[0, 0, 0, 0].backward()
    assert images.grad[0, :, :8, :8].abs().sum() > 0 and images.grad[0, :, 34:, 34:].abs().sum() == 0


def test_it_learns_to_tell_noise_from_flat_images():
    model = discriminator()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    real, fake = pictures(), torch.full((3, 3, 24, 24), 0.5) + 0.1 * torch.randn(3, 3, 1, 1)
    for _ in range(30):
        loss = discriminator_hinge_loss(model(real), model(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert model(pictures(1)).mean() > model(fake).mean() + 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_autocast_gives_the_float32_gradients_in_any_memory_format(memory_format):
    def gradients(autocast: bool, memory_format: torch.memory_format) -> torch.Tensor:
        model = discriminator().to(memory_format=memory_format)
        images = pictures().contiguous(memory_format=memory_format).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = discriminator_hinge_loss(model(images), model(1 - images))
        loss.backward()
        return torch.cat([images.grad.flatten(), *[p.grad.flatten() for p in model.parameters()]])

    exact, mixed = gradients(False, torch.contiguous_format), gradients(True, memory_format)
    assert torch.nn.functional.cosine_similarity(exact, mixed, dim=0) > 0.99


def test_the_norm_equals_torchs_own():
    ours, theirs = ContiguousGroupNorm(4, 8), torch.nn.GroupNorm(4, 8)
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0)).to(memory_format=torch.channels_last)
    torch.testing.assert_close(ours(x), theirs(x.contiguous()))


def test_contradictions_raise():
    with pytest.raises(ValueError, match="groups divide"):
        PatchDiscriminatorConfig(width=12)
    with pytest.raises(ValueError, match="at least 1 layer"):
        PatchDiscriminatorConfig(layers=0)
    with pytest.raises(ValueError, match="sides of at least 12 pixels"):
        discriminator()(torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"decay in \[0, 1\)"):
        LeCam(decay=1.0)
