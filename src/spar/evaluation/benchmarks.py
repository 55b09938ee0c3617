"""The table of benchmarks: name to a function of a pipe, options and a progress callback that returns a Result.

`zero_shot` and `recon` beside them need images of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from spar.common.progress import Advance
from spar.evaluation.options import EvalOptions, PipelineLike
from spar.evaluation.results import Result
from spar.evaluation.shapes_agreement import shapes_agreement
from spar.evaluation.shapes_chat import shapes_chat
from spar.evaluation.shapes_codes import shapes_codes
from spar.evaluation.shapes_edit import shapes_edit, shapes_edit_bind
from spar.evaluation.shapes_gen import shapes_gen, shapes_gen_bind
from spar.evaluation.shapes_paraphrase import shapes_paraphrase
from spar.evaluation.shapes_recon import shapes_recon
from spar.evaluation.shapes_robust import shapes_robust
from spar.evaluation.shapes_vqa import shapes_vqa, shapes_vqa_bind
from spar.evaluation.shapes_zero_shot import shapes_zero_shot

Benchmark = Callable[[PipelineLike, EvalOptions, Advance | None], Result]

BENCHMARKS: dict[str, Benchmark] = {
    "shapes-gen": shapes_gen,
    "shapes-edit": shapes_edit,
    "shapes-vqa": shapes_vqa,
    "shapes-recon": shapes_recon,
    "shapes-gen-bind": shapes_gen_bind,
    "shapes-edit-bind": shapes_edit_bind,
    "shapes-vqa-bind": shapes_vqa_bind,
    "shapes-paraphrase": shapes_paraphrase,
    "shapes-chat": shapes_chat,
    "shapes-robust": shapes_robust,
    "shapes-zero-shot": shapes_zero_shot,
    "shapes-codes": shapes_codes,
    "shapes-agreement": shapes_agreement,
}
# What a benchmark's main score measures.
MEASURED = {
    "shapes-gen": "generated images that show the whole prompt and nothing else",
    "shapes-edit": "edits that do what was requested and keep the rest",
    "shapes-vqa": "questions answered correctly",
    "shapes-recon": "objects, colors and pixels after reconstruction",
    "shapes-gen-bind": "shapes-gen on scenes in which objects share shape or color",
    "shapes-edit-bind": "shapes-edit on such scenes, with edits of size and place",
    "shapes-vqa-bind": "shapes-vqa on such scenes, with further questions",
    "shapes-paraphrase": "what is right in other words, of what is right in the usual ones",
    "shapes-chat": "answers right in each turn of a conversation",
    "shapes-robust": "strangers' prompts drawn as they were meant: other words, long texts, misspellings",
    "shapes-zero-shot": "objects named by the nearest label, by the two towers",
    "shapes-codes": "how much of each vocabulary is used, and how evenly",
    "shapes-agreement": "what the model says of its own drawings, from their codes, agrees with the prompts",
    "zero-shot": "your own images named by the nearest class, by the two towers",
    "recon": "your own images after reconstruction: PSNR, SSIM, rFID",
}
# What a benchmark needs of a model that not every system defines.
NEEDS = {
    "shapes-edit": "edit", "shapes-edit-bind": "edit", "shapes-paraphrase": "edit", "shapes-zero-shot": "classify",
    "shapes-codes": "encode", "shapes-agreement": "encode", "zero-shot": "classify",
    "recon": "reconstruct",
}  # fmt: skip


def suits(name: str, tasks: Collection[str]) -> bool:
    """Whether a benchmark can be run on a model of a system with these tasks."""
    return NEEDS.get(name, "generate") in tasks
