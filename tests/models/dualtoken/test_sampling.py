import pytest
import torch

from spar.common.errors import InputError
from spar.models.dualtoken.sampling import CodeSampling, choose
from spar.models.sampling import filtered, gumbel_noise

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_draws_follow_the_softmax_of_the_logits():
    noise = gumbel_noise(generators(1), (20000, 4), torch.device("cpu"))[0]
    codes = choose(LOGITS.expand(20000, -1), noise, CodeSampling(temperature=2.0))
    share = torch.bincount(codes, minlength=4) / 20000
    torch.testing.assert_close(share, (LOGITS[0] / 2).softmax(0), atol=0.015, rtol=0)


def test_an_images_noise_is_its_own_generators():
    both, second = (gumbel_noise(g, (3, 5), torch.device("cpu")) for g in (generators(2), generators(1, first=1)))
    assert torch.equal(both[1], second[0])
    assert torch.isfinite(both).all()


def test_temperature_zero_takes_the_likeliest_code():
    noise = torch.tensor([[0.0, 50.0, 0.0, 0.0]])
    assert choose(LOGITS, noise, CodeSampling(temperature=0)).tolist() == [0]
    assert choose(LOGITS, noise, CodeSampling()).tolist() == [1]


@pytest.mark.parametrize(
    ("sampling", "left"),
    [
        (CodeSampling(), 4),
        (CodeSampling(top_k=2), 2),
        (CodeSampling(top_k=9), 4),
        (CodeSampling(top_p=0.6), 1),        # the first has 0.64
        (CodeSampling(top_p=0.65), 2),
        (CodeSampling(top_p=1e-6), 1),
        (CodeSampling(top_k=3, top_p=0.999), 3),
    ],
)
def test_top_k_and_top_p_keep_the_likeliest(sampling, left):
    kept = torch.isfinite(filtered(LOGITS, temperature=1.0, top_k=sampling.top_k, top_p=sampling.top_p))[0]
    assert kept.tolist() == [True] * left + [False] * (4 - left)


def test_guidance_moves_from_the_unconditional_branch_through_the_conditional_one():
    conditional, unconditional, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.4]]), torch.zeros(1, 2)
    rows = torch.cat([conditional, unconditional])
    greedy = [choose(rows, noise, CodeSampling(temperature=0, guidance=g)).item() for g in (0.0, 1.0, 3.0)]
    assert greedy == [1, 0, 0]
    at_one = choose(rows, noise, CodeSampling(temperature=0, guidance=1.0))
    assert torch.equal(at_one, choose(conditional, noise, CodeSampling(temperature=0)))


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1},
              {"guidance": float("inf")}],
)  # fmt: skip
def test_settings_without_meaning_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(InputError, match=f"^{name}: expected .*, got "):
        CodeSampling(**wrong)
