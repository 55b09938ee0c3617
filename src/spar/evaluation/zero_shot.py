"""Zero-shot classification of image folders (CLIP, arXiv 2103.00020, section 3.1): class names in, accuracy out.

The image's feature is that of its semantic codes; beside it stands the encoder's own, without quantisation. The
difference of the two accuracies is what quantisation loses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spar.common.config import read_json
from spar.common.errors import InputError
from spar.common.limits import MAX_LABELS
from spar.common.progress import Advance
from spar.evaluation.environment import Timer, run_settings
from spar.evaluation.options import EvalOptions, batches
from spar.evaluation.results import Result, mean_score, shown_path
from spar.inference.image_files import list_images

TEMPLATE = "a photo of a {}."  # CLIP's and SigLIP's first


def zero_shot(
    pipe: Any, folder: Path, options: EvalOptions | None = None, progress: Advance | None = None, *,
    template: str = TEMPLATE, names: Path | None = None,
) -> Result:  # fmt: skip
    """Classify the images of FOLDER/CLASS/ among all classes, by `pipe.classify`.

    Args:
        folder: one subfolder of images for each class.
        template: a label's text, `{}` where the class's name goes.
        names: a JSON file {subfolder: name}; by default a class has its subfolder's name, `_` as a space.

    Scores: "overall" by quantised features and "part.unquantized" by the encoder's own, the share of right images;
    `options.limit` takes the first images of each class.

    Raises:
        InputError: a model without a text tower, a folder without classes or images, a class without a name, a text
            without `{}`, an image that cannot be read.
    """
    if not hasattr(pipe, "classify"):
        raise InputError("zero-shot needs a model with a text tower: expected one of DualToken")
    if template.count("{}") != 1:
        raise InputError(f"template: expected one {{}} for the class's name, got {template!r}")
    options, clock = options or EvalOptions(), Timer()
    classes = class_names(folder, names)
    labels = [template.replace("{}", name) for name in classes.values()]
    items = [
        (number, path)
        for number, subfolder in enumerate(classes)
        for path in list_images(folder / subfolder)[: options.limit]
    ]
    answers: dict[bool, list[int]] = {True: [], False: []}
    for chunk in batches(items, options.batch, progress):
        for quantized in answers:
            try:
                answers[quantized] += pipe.classify([path for _, path in chunk], labels, quantized=quantized)
            except InputError as error:
                if not str(error).startswith("label:"):
                    raise
                raise InputError(f"template {template!r}, {error}") from error  # whose words nobody may have typed
    truth = np.array([number for number, _ in items])
    scores = (
        mean_score("overall", (np.array(answers[True]) == truth).astype(float), seed=options.seed),
        mean_score("part.unquantized", (np.array(answers[False]) == truth).astype(float), seed=options.seed),
    )
    records = [
        {"image": shown_path(path.relative_to(folder)), "expected": labels[number], "answer": labels[answer]}
        for (number, path), answer in zip(items, answers[True], strict=True)
    ]
    settings = run_settings(
        pipe, options, clock, sampled=False, images=len(items), labels=len(labels), template=template
    )
    return Result("zero-shot", scores, settings, {"images": records})


def class_names(folder: Path, names: Path | None = None) -> dict[str, str]:
    """The classes' names by their subfolders, in the subfolders' order."""
    try:
        subfolders = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError as error:
        raise InputError(f"expected a folder of classes, but {str(folder)!r}: {error.strerror or error}") from error
    if not 2 <= len(subfolders) <= MAX_LABELS:
        raise InputError(
            f"expected one subfolder for each class in {str(folder)!r}, from 2 to {MAX_LABELS}, found {len(subfolders)}"
        )
    if names is None:
        return {subfolder: subfolder.replace("_", " ") for subfolder in subfolders}
    given: Mapping[str, Any] = read_json(names)
    for subfolder in subfolders:
        if not isinstance(given.get(subfolder), str) or not given[subfolder].strip():
            raise InputError(f"{names}: expected a name for the class {subfolder!r}, got {given.get(subfolder)!r}")
    return {subfolder: given[subfolder].strip() for subfolder in subfolders}
