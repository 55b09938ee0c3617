"""What a broken-off evaluation leaves, so that the same call goes on with it: the results that are whole, and of the
benchmark that was stopped the model's outputs so far.

Outputs depend on their inputs and seeds alone, so that a result is the same with a stop or without. They lie in a
folder beside the results, which goes when all are written.
"""

import base64
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from spar.common.config import read_json, write_json
from spar.common.errors import InputError
from spar.common.process_group import ProcessGroup
from spar.evaluation.sharing import SharedOutput
from spar.inference.image_files import encode_image
from spar.processing.images import ImageSource, open_image

SETTINGS, DONE = "evaluation.json", ".done"


class Unfinished:
    """The folder of an evaluation that is under way.

    Args:
        folder: `RESULT.json.unfinished` beside the result, or `all.unfinished` among several.
        group: the processes that share the evaluation; one of them reads and writes.
        results: the file of each benchmark's result.
    """

    def __init__(self, folder: Path, group: ProcessGroup, results: Mapping[str, Path]) -> None:
        self.folder, self.group, self.results = folder, group, results

    def written(self) -> set[str]:
        """The benchmarks whose results were written before the stop."""
        return self.group.main_only(
            lambda: {
                name for name, path in self.results.items()
                if (self.folder / f"{name}{DONE}").is_file() and path.is_file()
            }
        )  # fmt: skip

    def begin(self, identity: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make the folder, or check that the same call left it; one without outputs is made anew.

        Args:
            identity: of the call.
            overwrite: whether to begin anew where another call left it.

        Raises:
            InputError: it is of another call; the message has what differs.
        """
        wanted = json.loads(json.dumps(identity))

        def begun() -> None:
            path = self.folder / SETTINGS
            if path.is_file() and {*self.folder.iterdir()} != {path}:
                found = read_json(path)
                other = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
                if not other:
                    return
                if not overwrite:
                    was, now = (str(one.get(other[0]))[:200] for one in (found, wanted))
                    differs = f"begun with another {other[0]}: {was}, got {now}"
                    raise InputError(f"{self.folder} was {differs}; --overwrite begins anew")
            self.end()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, wanted)

        self.group.main_only(begun)

    def recorded(self, name: str, pipe: Any) -> "RecordedPipeline":
        """The pipeline, whose outputs in a benchmark are kept and not computed again."""
        return RecordedPipeline(pipe, self.folder / name, self.group)

    def finish(self, name: str) -> None:
        """Mark a benchmark's result as written; its outputs go. The main process alone calls it."""
        (self.folder / f"{name}{DONE}").touch()
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def end(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


class RecordedPipeline:
    """A pipeline whose outputs for several inputs are kept in a folder, by the number of the call.

    A call with other inputs than the kept one is computed. What is not below is the pipeline's own.

    Attributes:
        kept: calls so far that were not computed.
    """

    def __init__(self, pipe: Any, folder: Path, group: ProcessGroup) -> None:
        self.pipe, self.folder, self.group = pipe, folder, group
        self.calls = self.kept = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def generate(self, prompt: Sequence[str], **settings: Any) -> SharedOutput:
        """As the pipeline's."""
        return self._recorded(lambda: self.pipe.generate(prompt, **settings), "generate", prompt, settings)

    def edit(self, image: Sequence[ImageSource], instruction: Sequence[str], **settings: Any) -> SharedOutput:
        """As the pipeline's."""
        asked = (_digests(image), instruction, settings)
        return self._recorded(lambda: self.pipe.edit(image, instruction, **settings), "edit", *asked)

    def understand(self, image: Sequence[ImageSource], question: Sequence[str], **settings: Any) -> SharedOutput:
        """As the pipeline's."""
        asked = (_digests(image), question, settings)
        return self._recorded(lambda: self.pipe.understand(image, question, **settings), "understand", *asked)

    def reconstruct(self, image: Sequence[ImageSource]) -> SharedOutput:
        """As the pipeline's."""
        return self._recorded(lambda: self.pipe.reconstruct(image), "reconstruct", _digests(image))

    def _recorded(self, compute: Callable[[], Any], *asked: Any) -> SharedOutput:
        path = self.folder / f"{self.calls:06}.json"
        self.calls += 1
        text = json.dumps(asked, default=str).encode("utf-8", "surrogatepass")
        key = hashlib.sha256(text).hexdigest()
        found = self.group.main_only(lambda: _read(path, key))
        if found is not None:
            self.kept += 1
            return found
        out = compute()
        made = SharedOutput(images=getattr(out, "images", ()), texts=getattr(out, "texts", ()))
        self.group.main_only(lambda: _write(path, key, made))
        return made


def _digests(images: Sequence[ImageSource]) -> list[str]:
    return [hashlib.sha256(open_image(one).convert("RGB").tobytes()).hexdigest() for one in images]


def _write(path: Path, key: str, output: SharedOutput) -> None:
    images = [base64.b64encode(encode_image(image, "png", {})).decode() for image in output.images]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "images": images, "texts": list(output.texts)})


def _read(path: Path, key: str) -> SharedOutput | None:
    """The output of the call with this key; None for another, or one that is not there or is damaged."""
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        if values["key"] != key:
            return None
        images = [Image.open(BytesIO(base64.b64decode(one)), formats=("PNG",)) for one in values["images"]]
        for image in images:
            image.load()
        return SharedOutput(images=images, texts=values["texts"])
    except (InputError, KeyError, TypeError, ValueError, OSError, SyntaxError):
        return None
