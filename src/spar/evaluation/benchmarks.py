"""The table of benchmarks: name to a function of a pipe, options and a progress callback that returns a Result."""

from __future__ import annotations

from collections.abc import Callable

from spar.common.progress import Advance
from spar.evaluation.options import EvalOptions, PipelineLike
from spar.evaluation.results import Result
from spar.evaluation.shapes_chat import shapes_chat
from spar.evaluation.shapes_edit import shapes_edit, shapes_edit_bind
from spar.evaluation.shapes_gen import shapes_gen, shapes_gen_bind
from spar.evaluation.shapes_paraphrase import shapes_paraphrase
from spar.evaluation.shapes_recon import shapes_recon
from spar.evaluation.shapes_vqa import shapes_vqa, shapes_vqa_bind

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
}
