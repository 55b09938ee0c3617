"""What weights are after they were stored in 16 or 8 bits."""

import pytest
import torch

from spar.checkpoints.eight_bits import rounded
from spar.common.errors import InputError
from spar.training.objectives.dual_next_token import DualNextTokenObjective

EXACT, FINE, COARSE = 1.25, 1.25 + 2**-7, 1.25 + 2**-9  # held by 3 bits of mantissa, by 7, and by neither


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("encoder.layers.0.mlp.weight", 16, [EXACT, FINE, EXACT]), ("encoder.layers.0.mlp.weight", 8, [EXACT] * 3),
        ("embeddings.position_embedding.weight", 8, [EXACT, FINE, EXACT]),
        ("pixel_quantizer.codebook", 8, [EXACT, FINE, EXACT]), ("embed_tokens.weight", 8, [EXACT, FINE, EXACT]),
    ],
)  # fmt: skip
def test_a_matrix_keeps_what_its_bits_hold(name, bits, expected):
    assert rounded(name, torch.tensor([[EXACT, FINE, COARSE]]), bits).tolist() == [expected]


def test_vectors_take_16_bits_and_whole_numbers_stay():
    assert rounded("norm.weight", torch.tensor([EXACT, FINE]), 8).tolist() == [EXACT, FINE]
    assert rounded("codes", torch.tensor([[300, 513]]), 8).tolist() == [[300, 513]]


def test_a_tokenizer_has_8_or_16_bits():
    with pytest.raises(InputError, match="tokenizer_bits: expected 8 or 16, got 4"):
        DualNextTokenObjective(tokenizer_bits=4)
