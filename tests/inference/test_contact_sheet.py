"""A contact sheet, an animation and a notebook's HTML have the images' own pixels, in order."""

import base64
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from spar.common.errors import InputError
from spar.inference import contact_sheet as sheets
from spar.inference.contact_sheet import GAP, contact_sheet, images_html, save_animation
from spar.inference.progress import MAX_FRAMES, StepRecorder


def plain(*levels: int, size: tuple[int, int] = (8, 6)) -> list[Image.Image]:
    return [Image.new("RGB", size, (level, 0, 255 - level)) for level in levels]


def cell(sheet: Image.Image, row: int, column: int, size: tuple[int, int] = (8, 6)) -> np.ndarray:
    left, top = column * (size[0] + GAP), row * (size[1] + GAP)
    return np.asarray(sheet.crop((left, top, left + size[0], top + size[1])))


@pytest.mark.parametrize(
    ("count", "columns", "shape"),
    [(1, None, (1, 1)), (5, None, (2, 3)), (9, None, (3, 3)), (5, 2, (3, 2)), (3, 9, (1, 3)), (3, 1, (3, 1))],
)
def test_a_sheet_has_the_images_row_by_row(count, columns, shape):
    images = plain(*range(count))
    sheet = contact_sheet(images, columns)
    assert sheet.size == (shape[1] * (8 + GAP) - GAP, shape[0] * (6 + GAP) - GAP)
    for index, image in enumerate(images):
        assert (cell(sheet, *divmod(index, shape[1])) == np.asarray(image)).all()


def test_a_smaller_image_is_in_the_middle_of_its_cell():
    sheet = contact_sheet([*plain(9), *plain(7, size=(4, 2))])
    inside = cell(sheet, 0, 1)
    assert (inside[2:4, 2:6] == (7, 0, 248)).all() and (inside == 255).all(-1).sum() == 8 * 6 - 4 * 2


def test_a_sheet_of_many_images_is_bounded(monkeypatch):
    monkeypatch.setattr(sheets, "MAX_SHEET", 100)
    sheet = contact_sheet(plain(*range(16), size=(64, 64)))
    assert max(sheet.size) <= 100
    assert sheet.getpixel((0, 0)) == (0, 0, 255) and sheet.getpixel((99 - GAP, 99 - GAP)) == (15, 0, 240)


@pytest.mark.parametrize(("images", "columns"), [([], None), (plain(1), 0), (plain(1), 1.5), (plain(1), True)])
def test_what_makes_no_sheet_is_refused(images, columns):
    with pytest.raises(InputError, match="expected"):
        contact_sheet(images, columns)


def test_an_animation_has_the_frames_and_holds_the_last(tmp_path):
    path = tmp_path / "steps" / "a.gif"
    save_animation(plain(0, 120, 250), path)
    with Image.open(path) as image:
        assert (image.n_frames, image.info["loop"]) == (3, 0)
        times = []
        for number, level in enumerate((0, 120, 250)):
            image.seek(number)
            times.append(image.info["duration"])
            assert np.abs(np.asarray(image.convert("RGB")).astype(int)[0, 0] - (level, 0, 255 - level)).max() <= 2
    assert times == [sheets.FRAME_MS] * 2 + [sheets.LAST_FRAME_MS]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save_animation(plain(1), tmp_path / "file" / "a.gif")


@pytest.mark.parametrize("steps", [1, 5, MAX_FRAMES, MAX_FRAMES + 1, 1000])
def test_a_recorder_keeps_the_last_step_and_few_enough(steps):
    told = []
    recorder = StepRecorder(lambda state: [state, -state], lambda *step: told.append(step[:2]))
    for done in range(1, steps + 1):
        assert recorder(done, steps, done) is None
    kept = recorder.of_image(0)
    assert kept[-1] == steps and len(kept) == min(steps, MAX_FRAMES) and recorder.of_image(1) == [-one for one in kept]
    gaps = np.diff([0, *kept])
    assert gaps.max() - gaps.min() <= 1
    assert told == [(done, steps) for done in range(1, steps + 1)]
    assert StepRecorder(lambda state: [state], lambda *_: False)(1, 2, 0) is False  # it may cancel


def test_html_holds_the_pixels_and_says_what_it_leaves_out():
    images = plain(*range(sheets.MAX_SHOWN + 2))
    shown = images_html(images, [f"number {i}" for i in range(len(images))])
    files = re.findall(r"base64,([^\"]+)", shown)
    assert len(files) == sheets.MAX_SHOWN and "and 2 more" in shown
    with Image.open(BytesIO(base64.b64decode(files[3]))) as image:
        assert image.tobytes() == images[3].tobytes()
    assert "more" not in images_html(images[:1], ["one"])
