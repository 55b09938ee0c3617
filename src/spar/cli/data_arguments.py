"""Arguments of the verbs of data sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from spar.cli.arguments import Flag, check_nonempty
from spar.common.limits import MAX_SEED, MAX_WORKERS, check_range
from spar.data.samples import Format


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The data set, and how to read it."""

    path: Annotated[Positional[tuple[str, ...]], arg(metavar="PATH")]
    """Shards by name, {0000..2175}, glob or hf://datasets/...; a folder of shards, of parquet files or with
    metadata.jsonl; a ShareGPT-4o-Image list (.json); a GPT-Image-Edit index (.txt)."""
    format: Format = "auto"
    """Format of PATH; auto derives it from the name."""
    cache: Path | None = None
    """Folder of shard indexes; by default they are built each time."""
    workers: int = 4
    """Processes."""

    def __post_init__(self) -> None:
        check_nonempty(self.path, "data set", "PATH")
        check_range("--workers", self.workers, 1, MAX_WORKERS)


@dataclass(frozen=True, kw_only=True)
class DataCheckArguments(DataArguments):
    """Read and decode every sample and report what is wrong: spar data check "shards/*.tar"

    The exit status is 1 if anything is wrong.
    """

    limit: int | None = None
    """Samples to check, evenly spread; by default all."""
    max_characters: int = 4096
    """Longest caption."""
    json: Flag = False
    """Print the findings as JSON."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--limit", self.limit, 1, MAX_SEED)
        check_range("--max-characters", self.max_characters, 1, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class DataConvertArguments(DataArguments):
    """Write a data set as webdataset shards: spar data convert data.txt -o shards

    Complete images are copied byte by byte; the others are left out and listed in dropped.jsonl.
    """

    output: Annotated[Path, arg(aliases=["-o"])]
    """Folder to write."""
    overwrite: Flag = False
    """Replace an earlier conversion."""
    shard_size: int = 10_000
    """Samples per shard."""
    bad_share: float = 0.01
    """Share of bad samples above which nothing is written, measured from 1000 samples on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("--shard-size", self.shard_size, 1, 10**6)
        check_range("--bad-share", self.bad_share, 0, 1)
