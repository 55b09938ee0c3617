"""What callers give to a task."""

import weakref

import numpy as np
from PIL import Image

from spar.inference import inputs
from spar.inference.inputs import open_sources


def test_of_large_images_one_at_a_time_is_open_and_one_that_is_given_often_once(monkeypatch):
    opened, refs = [], []

    def open_image(source: Image.Image) -> Image.Image:
        assert all(one() is None for one in refs)
        image = source.copy()
        opened.append(image.size)
        refs.append(weakref.ref(image))
        return image

    monkeypatch.setattr(inputs, "open_image", open_image)
    one, other = Image.new("RGB", (90, 50)), Image.new("RGB", (50, 90))
    assert open_sources([one, other, one, one], lambda image: image.size) == [(90, 50), (50, 90), (90, 50), (90, 50)]
    assert opened == [(90, 50), (50, 90)]


def test_each_image_of_an_array_is_its_own():
    pixels = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert open_sources(pixels, lambda image: image.getpixel((0, 0))[0]) == [0, 1, 2, 3]
