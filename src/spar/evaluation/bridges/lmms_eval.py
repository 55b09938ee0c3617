"""SPAR as a chat model of lmms-eval (0.7.3): `python -m lmms_eval --model spar --model_args model=FOLDER --tasks mme`.

lmms-eval finds it by the entry point `lmms_eval.models`, which names `manifest`. Of each task it reads the messages
(`doc_to_messages`), as its own chat models do. Several processes share the documents: the evaluator gives each process
its own requests, and each process has a whole model.
"""

import importlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spar.checkpoints.bundled import DEFAULT_MODEL
from spar.common.errors import InputError
from spar.common.limits import one_reference

MODEL_ID = "spar"
MODES = ("understand", "generate", "edit")

try:
    _Base: Any = importlib.import_module("lmms_eval.api.model").lmms
except ModuleNotFoundError as missing:
    if missing.name != "lmms_eval":
        raise  # lmms-eval is there, and something that it imports is not
    _Base = object


def manifest() -> Any:
    """The `ModelManifest` of the entry point.

    Raises:
        InputError: lmms-eval is not installed.
    """
    _check_installed()
    registry = importlib.import_module("lmms_eval.models.registry_v2")
    return registry.ModelManifest(model_id=MODEL_ID, chat_class_path=f"{__name__}.{SparChatModel.__name__}")


def cut_at(pieces: Iterable[str], stops: Sequence[str]) -> str:
    """The text before the first stop string; no piece after it is decoded."""
    text = ""
    for piece in pieces:
        text += piece
        found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
        if found:
            return text[: min(found)]
    return text


class SparChatModel(_Base):
    """A model that answers with text, or with images where `mode` is not "understand".

    Args:
        model: a folder, the name of a bundled model, or `hf://OWNER/NAME`.
        dtype: of matrix products; by default as in `SparPipeline.from_pretrained`, and so the device.
        device: with several processes "cpu" or "cuda", of which each process has its own.
        max_tiles: of an image to answer about; by default the model's own number.
        mode: "generate" draws a request's text, and edits its image if it has one; "edit" refuses a request without an
            image. An answer is then the JSON text `{"text": "", "images": [absolute path]}`.
        output: the folder of these images, `TASK/DOCUMENT.png`; existing files are replaced.
        seed: of a document's first answer or image; its repeats count up. Answers at temperature 0 have none.
        num_inference_steps: of an image; by default the model's own.
        guidance_scale: as `num_inference_steps`.
        batch_size: lmms-eval's; requests are computed one by one.

    Raises:
        InputError: lmms-eval is not installed, a setting that its mode does not read, or as `load_pipeline`.
    """

    is_simple = False

    def __init__(
        self, model: str = DEFAULT_MODEL, dtype: str | None = None, device: str | None = None,
        max_tiles: int | None = None, mode: str = "understand", output: str | None = None, seed: int = 0,
        num_inference_steps: int | None = None, guidance_scale: float | None = None, batch_size: int | str = 1,
    ) -> None:  # fmt: skip
        from spar.inference.loading import load_pipeline

        _check_installed()
        super().__init__()
        drawing = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        _check_settings(mode, output, max_tiles, drawing)
        if str(batch_size) != "1":
            raise InputError(f"batch_size: expected 1, since requests are computed one by one, got {batch_size}")
        self.mode, self.output, self.max_tiles, self.seed, self.drawing = mode, output, max_tiles, seed, drawing
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            device = self._join_processes(device)
        self.pipeline: Any = load_pipeline(str(model), dtype=dtype, device=device, progress=False)
        self.device = self.pipeline.device  # where the evaluator gathers counts from the processes

    def _join_processes(self, device: str | None) -> str:
        """The device of this process, and the `accelerator` by which the evaluator gathers."""
        from accelerate import Accelerator

        if device not in (None, "cpu", "cuda"):
            raise InputError(f"device: expected cpu or cuda, of which each process has its own, got {device}")
        self.accelerator = Accelerator(cpu=device == "cpu")
        return str(self.accelerator.device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """An answer, or the JSON text of an image, for each request, in their order."""
        results = []
        for request, repeat in self._numbered(requests):
            _, doc_to_messages, options, document, task, split = request.args
            messages = _read(doc_to_messages(self.task_dict[task][split][document]))
            if self.mode == "understand":
                results.append(self._answer(messages, options, self.seed + repeat))
            else:
                name = f"{document}-{repeat}.png" if repeat else f"{document}.png"
                results.append(self._draw(messages, f"{task}/{name}", self.seed + repeat))
        return results

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of all rounds of each request. A task makes the messages of a round from the answers before it;
        they are a conversation of their own.
        """
        if self.mode != "understand":
            raise InputError(f"mode: expected understand for a task of several rounds, got {self.mode}")
        results = []
        for request, repeat in self._numbered(requests):
            _, doc_to_messages, options, document, task, split = request.args
            doc = self.task_dict[task][split][document]
            messages, answers, ended, info = doc_to_messages(doc), [], False, None
            while not ended:
                answers.append(self._answer(_read(messages), options, self.seed + repeat))
                round_state = {"previous_output": list(answers), "previous_round_info": info}
                following = doc_to_messages(doc, round_idx=len(answers), **round_state)
                if not (isinstance(following, tuple) and len(following) == 4):
                    break  # a task of one round
                messages, ended, _, info = following
            results.append(answers)
        return results

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Refused.

        Raises:
            InputError: always.
        """
        raise InputError(
            "output_type: expected generate_until or generate_until_multi_round, since SPAR gives no likelihood of a "
            "given answer, got a task of loglikelihood or multiple_choice"
        )

    def clean(self) -> None:
        """Free the model's memory: a judge may be loaded next."""
        self.pipeline = None
        super().clean()

    def _numbered(self, requests: Sequence[Any]) -> Iterator[tuple[Any, int]]:
        """Each request with its number among its repeats, which lmms-eval gives as one object several times. A copy, by
        which it makes the counts of the processes equal, begins at 0 and gives the same result again.
        """
        from tqdm.auto import tqdm

        seen: Counter[int] = Counter()
        for request in tqdm(requests, desc="SPAR", disable=self.rank != 0):
            yield request, seen[id(request)]
            seen[id(request)] += 1

    def _answer(self, messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any], seed: int) -> str:
        temperature, top_p = options.get("temperature") or 0.0, options.get("top_p")
        drawn = {"top_p": 1.0 if top_p is None else top_p, "seed": seed} if temperature else {}
        pieces = self.pipeline.chat(
            messages, max_new_tokens=options.get("max_new_tokens"), temperature=temperature, max_tiles=self.max_tiles,
            **drawn,
        )  # fmt: skip
        until = options.get("until") or []
        return cut_at(pieces, [until] if isinstance(until, str) else until)

    def _draw(self, messages: Sequence[Mapping[str, Any]], name: str, seed: int) -> str:
        """Generate or edit the image of a request, write it and name it in JSON."""
        if [message["role"] for message in messages] != ["user"]:
            raise InputError(f"messages: expected one of the user for an image, got {len(messages)} messages")
        parts = messages[0]["content"]
        kinds = {part["type"] for part in parts}
        if not kinds <= {"text", "image"}:
            raise InputError(f"messages: expected texts and an image, got {', '.join(sorted(kinds))}")
        text = "\n".join(part["text"] for part in parts if part["type"] == "text")
        images = [part["image"] for part in parts if part["type"] == "image"]
        if len(images) > 1 or (self.mode == "edit" and not images):
            raise InputError(f"messages: {one_reference(len(images))}")
        if images:
            out = self.pipeline.edit(images, text, seed=seed, **self.drawing)
        else:
            out = self.pipeline.generate(text, seed=seed, **self.drawing)
        (path,) = out.save(Path(str(self.output)) / name, overwrite=True)
        return json.dumps({"text": "", "images": [str(path.absolute())]}, ensure_ascii=False)


def _read(messages: Any) -> list[dict[str, Any]]:
    """A task's messages in the form of `chat`, checked by lmms-eval's own classes."""
    protocol = importlib.import_module("lmms_eval.protocol")
    return list(protocol.ChatMessages(messages=messages).to_hf_messages())


def _check_installed() -> None:
    if _Base is object:
        raise InputError("lmms-eval: expected it to be installed (pip install lmms-eval), got no module lmms_eval")


def _check_settings(mode: str, output: str | None, max_tiles: int | None, drawing: Mapping[str, Any]) -> None:
    """Refuse an unknown mode, a setting that the mode does not read, and images without a folder."""
    if mode not in MODES:
        raise InputError(f"mode: expected one of {', '.join(MODES)}, got {mode}")
    unread = {"output": output, **drawing} if mode == "understand" else {"max_tiles": max_tiles}
    for name, value in unread.items():
        if value is not None:
            raise InputError(f"{name}: expected none with mode={mode}, which does not read it, got {value}")
    if mode != "understand" and output is None:
        raise InputError(f"output: expected a folder for the images of mode={mode}, got none")
