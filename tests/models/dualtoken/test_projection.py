import pytest
import torch
import torch.nn.functional as F

from spar.models.dualtoken.projection import AttnProjection, ProjectionAttention


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_projection_is_its_formula(randomize):
    module, x = randomize(AttnProjection(12, 4, heads=3)), draw(2, 5, 12)

    def norm(layer, y, eps=1e-5):
        return F.layer_norm(y, y.shape[-1:], layer.weight, layer.bias, eps)

    y = F.linear(norm(module.norm3, x), module.proj.weight, module.proj.bias) + module.attn(norm(module.norm1, x))
    mlp, z = module.mlp, norm(module.mlp.norm, norm(module.norm2, y), 1e-6)          # two norms in a row
    gate, up = (F.linear(z, layer.weight, layer.bias) for layer in (mlp.w0, mlp.w1))
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    wanted = y + F.linear(gelu * up, mlp.w2.weight, mlp.w2.bias)
    torch.testing.assert_close(module(x), wanted)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("narrow", "wide", "heads"), [(4, 12, 3), (4, 12, 2)])
def test_attention_averages_its_heads_to_fewer_channels_and_joins_them_to_more(randomize, causal, narrow, wide, heads):
    for width, out in ((wide, narrow), (narrow, wide)):
        module, x = randomize(ProjectionAttention(width, out, heads, causal=causal)), draw(2, 5, width)
        query, key, value = F.linear(x, module.qkv.weight).chunk(3, dim=-1)
        query, value = query + module.q_bias, value + module.v_bias            # keys have none
        query, key, value = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (query, key, value))
        y = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        if width > out:
            y = F.adaptive_avg_pool1d(y.mean(1), out)
        else:
            y = y.transpose(1, 2).flatten(2)
        torch.testing.assert_close(module(x), F.linear(y, module.proj.weight, module.proj.bias))


@pytest.mark.parametrize("causal", [False, True])
def test_a_causal_projection_alone_hides_later_positions(randomize, causal):
    module, x = randomize(AttnProjection(4, 8, heads=2, causal=causal)), draw(1, 6, 4)
    other = x.clone()
    other[:, 4:] = draw(1, 2, 4, seed=1)
    same = (module(x)[:, :4] - module(other)[:, :4]).abs().max() < 1e-6
    assert bool(same) is causal
