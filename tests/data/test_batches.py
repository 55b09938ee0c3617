"""Batches: frozen values that move as a whole."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

from spar.data.batches import Captioned, Edits, Images
from spar.recipes.shapes.dense_tagging import Tagged


def test_a_batch_moves_with_all_its_tensors_and_stays_what_it_is():
    pixels, keys = torch.rand(2, 3, 4, 4), np.array([5, -1])
    edits = Edits(keys=keys, pixels=pixels, texts=("a", None), references=pixels + 1, features={"f_v": pixels + 2})
    moved = edits.to("meta")
    assert type(moved) is Edits and moved.texts == ("a", None) and moved.keys is keys and len(moved) == 2
    assert {moved.pixels.device.type, moved.references.device.type, moved.features["f_v"].device.type} == {"meta"}
    assert edits.pixels.device.type == "cpu"
    tagged = Tagged(keys=keys, pixels=pixels, tags={"shape": torch.zeros(2, 4)}).to("meta")
    assert tagged.tags["shape"].is_meta


def test_a_batch_cannot_be_changed_and_needs_no_pixels_where_features_stand_in():
    batch = Captioned(keys=np.array([1]), texts=("a red circle",), features={"f_v": torch.zeros(1, 4, 8)})
    assert batch.pixels is None and isinstance(batch, Images)
    with pytest.raises(FrozenInstanceError):
        batch.texts = ()
