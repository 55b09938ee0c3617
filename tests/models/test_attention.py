import pytest
import torch
import torch.nn.functional as F

from spar.models.attention import MASKED, attention, attention_bias, position_ids_from_mask

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_explicit_attention_equals_the_fused_kernel_in_value_and_gradient(masked, monkeypatch):
    inputs = [draw(2, 3, 5, 8, seed=seed).requires_grad_() for seed in range(3)]
    bias = attention_bias(MASK, inputs[0], causal=True) if masked else None
    seeing = MASK.bool()[:, None, :, None] if masked else torch.ones(1, 1, 1, 1).bool()  # padding sees nothing
    weight = draw(2, 3, 5, 8, seed=9) * seeing
    fused = F.scaled_dot_product_attention(*inputs, attn_mask=bias)
    wanted = torch.autograd.grad((fused * weight).sum(), inputs)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # on a CPU, training must not go through it
    explicit = attention(*inputs, bias)
    torch.testing.assert_close(explicit * seeing, fused * seeing)
    for own, other in zip(torch.autograd.grad((explicit * weight).sum(), inputs), wanted, strict=True):
        torch.testing.assert_close(own, other)


def test_attention_without_gradients_equals_attention_with_them():
    query, key, value = (draw(2, 3, 5, 8, seed=seed) for seed in range(3))
    bias = attention_bias(MASK, query, causal=False)
    torch.testing.assert_close(attention(query, key, value, bias), attention(query.requires_grad_(), key, value, bias))


def allowed(bias: torch.Tensor) -> list[list[list[bool]]]:
    assert set(bias.unique().tolist()) <= {0.0, MASKED}
    return (bias[:, 0] == 0).tolist()


@pytest.mark.parametrize("causal", [False, True])
def test_a_token_sees_the_real_tokens_and_when_causal_none_behind_it(causal):
    bias = attention_bias(MASK, draw(1), causal=causal)
    assert allowed(bias) == [
        [[bool(row[key]) and (not causal or key <= query) for key in range(5)] for query in range(5)] for row in MASK
    ]


def test_new_tokens_behind_a_cache_have_the_last_rows_of_the_full_bias():
    full = attention_bias(MASK, draw(1), causal=True)
    torch.testing.assert_close(attention_bias(MASK, draw(1), causal=True, past=3), full[:, :, 3:])


def test_an_explicit_mask_is_taken_as_it_is():
    mask = draw(2, 5, 5) > 0
    assert allowed(attention_bias(mask, draw(1), causal=False)) == mask.tolist()


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bfloat16,
        torch.float16,
    ],
)
def test_a_row_that_may_see_nothing_stays_finite_in_half_precision(dtype):
    query, key, value = (draw(2, 3, 5, 8, seed=seed).to(dtype) for seed in range(3))
    bias = attention_bias(torch.zeros(2, 5), query, causal=True)
    assert bias.dtype == dtype
    assert attention(query, key, value, bias).isfinite().all()


def test_the_bias_has_the_type_that_autocast_multiplies_in():
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_bias(MASK, draw(1), causal=True).dtype == torch.bfloat16
    assert attention_bias(MASK, draw(1), causal=True).dtype == torch.float32


def test_positions_count_real_tokens_only():
    assert position_ids_from_mask(MASK).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
