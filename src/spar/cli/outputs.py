"""The files that a sampling verb writes: images, a contact sheet, the steps of sampling."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.cli.console import progress_bar
from spar.cli.task_arguments import SamplingArguments
from spar.common.progress import Advance
from spar.common.seeds import list_seeds
from spar.inference.image_files import check_writable, numbered_names, output_paths, save_images, source_metadata

if TYPE_CHECKING:
    from spar.inference.base import Pipeline
    from spar.inference.progress import StepRecorder

Callback = Callable[[int, int, Any], bool | None]


@dataclass
class OutputFiles:
    """Paths, checked before the work begins: of the images `paths`, of their `animations` and of the `sheet`."""

    seeds: list[int]
    paths: list[Path]
    animations: list[Path] = field(default_factory=list)
    sheet: Path | None = None
    columns: int | None = None

    @classmethod
    def of(cls, args: SamplingArguments) -> "OutputFiles":
        """Draw the seeds and name the files of a verb's arguments.

        Raises:
            InputError: a file exists already, or cannot be written.
        """
        seeds = list_seeds(args.seed, args.count)
        paths = output_paths(args.output, numbered_names(seeds))
        files = cls(seeds, paths, columns=args.num_images_per_prompt if args.num_images_per_prompt > 1 else None)
        if args.save_steps:
            files.animations = [path.with_suffix(".gif") for path in paths]
        if args.grid:
            alone = len(paths) == 1  # the user's name is the image's own
            files.sheet = paths[0].with_name(f"{paths[0].stem}-grid.png" if alone else "grid.png")
        wanted = [*paths, *files.animations, *([files.sheet] if files.sheet else [])]
        check_writable(wanted, overwrite=args.overwrite)
        return files

    def draw(
        self, pipe: "Pipeline", make: Callable[..., Any], texts: Sequence[str], *, batch: int,
        num_images_per_prompt: int, source: Path | None = None, **keywords: Any,
    ) -> None:  # fmt: skip
        """Make the images and write them with the metadata that reproduces them, each batch as soon as it is made; then
        write the sheet, and print the paths of what was written, also where a later batch fails.

        Args:
            make: the pipeline's task, of texts and keywords.
            texts: prompts or instructions.
            batch: images that are made together.
            num_images_per_prompt: of each text.
            source: the image that is edited.
            keywords: those of the task.
        """
        from spar.inference.contact_sheet import contact_sheet
        from spar.inference.progress import StepRecorder

        origin = source_metadata(source) if source else {}
        batches = _batches(texts, num_images_per_prompt, batch)
        for text in texts if len(batches) > 1 else ():  # before the first batch is made, not the last
            pipe.check_text(text, "instruction" if source else "prompt")
        lines, made = list[str](), list[Any]()
        try:
            with progress_bar("sampling") as advance:
                for number, (some, each, part) in enumerate(batches):
                    moving = _moving(advance, number, len(batches))
                    steps = StepRecorder(pipe.preview, moving) if self.animations else None
                    out = make(
                        some, seed=self.seeds[part], num_images_per_prompt=each, callback=steps or moving, **keywords
                    )
                    lines += self._write(out, part, steps, origin)
                    made += out.images if self.sheet else []
            if self.sheet:
                save_images([contact_sheet(made, self.columns)], [self.sheet])
                lines.append(f"{self.sheet}  (all images)")
        finally:
            for line in lines:
                print(line)

    def _write(self, out: Any, part: slice, steps: "StepRecorder | None", origin: Mapping[str, str]) -> list[str]:
        """Write a batch and its animations; a line of each file."""
        from spar.inference.contact_sheet import save_animation

        save_images(out.images, self.paths[part], [values | origin for values in out.metadata])
        lines = [f"{path}  (seed {seed})" for path, seed in zip(self.paths[part], out.seeds, strict=True)]
        if steps:
            for index, path in enumerate(self.animations[part]):
                save_animation(steps.of_image(index), path)
                lines.append(f"{path}  (steps of sampling)")
        return lines


def _batches(texts: Sequence[str], each: int, size: int) -> list[tuple[list[str], int, slice]]:
    """Texts, images of each and their places among all images: one batch where it is small enough, else as many of
    single images as there must be.
    """
    count = len(texts) * each
    if count <= size:
        return [([*texts], each, slice(0, count))]
    every = [text for text in texts for _ in range(each)]
    return [(every[start : start + size], 1, slice(start, start + size)) for start in range(0, count, size)]


def _moving(advance: Advance | None, number: int, batches: int) -> Callback | None:
    """The callback of a batch that moves a bar of all of them on a terminal."""
    if advance is None:
        return None
    return lambda done, total, _: advance(number * total + done, batches * total)
