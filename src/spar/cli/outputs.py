"""The files that a sampling verb writes: images, a contact sheet, the steps of sampling."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spar.cli.console import progress_bar
from spar.cli.task_arguments import SamplingArguments
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
    recorder: "StepRecorder | None" = None

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

    @contextmanager
    def watching(self, pipe: "Pipeline") -> Iterator[Callback | None]:
        """The callback of the pipeline: it moves a bar on a terminal, and keeps the steps if they are written."""
        with progress_bar("sampling") as advance:
            callback: Callback | None = None if advance is None else lambda done, total, _: advance(done, total)
            if self.animations:
                from spar.inference.progress import StepRecorder

                self.recorder = callback = StepRecorder(pipe.preview, callback)
            yield callback

    def save(self, out: Any, source: Path | None = None) -> None:
        """Write the images with the metadata that reproduces them, sheet and animations, and print the paths."""
        origin = source_metadata(source) if source else {}
        save_images(out.images, self.paths, [values | origin for values in out.metadata])
        for path, seed in zip(self.paths, out.seeds, strict=True):
            print(f"{path}  (seed {seed})")
        from spar.inference.contact_sheet import contact_sheet, save_animation

        if self.recorder:
            for number, path in enumerate(self.animations):
                save_animation(self.recorder.of_image(number), path)
                print(f"{path}  (steps of sampling)")
        if self.sheet:
            save_images([contact_sheet(out.images, self.columns)], [self.sheet])
            print(f"{self.sheet}  (all images)")
