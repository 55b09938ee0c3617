"""Frozen features of data sets, computed once: what the unified stages read in place of images.

A folder of safetensors, one file for each thousand samples: the target's `f_v` `[n, N, D]` and normalised latent
`[n, D_p, h, w]`, of an edit the reference's `f_v` too, in the type of a step's products, and each sample's `id`.
`cache.json` holds the key: the tokenizer's weights and forms, the images' size and the samples. A cache of another
key is refused. The prompts' states are not kept: the queries that follow them train, and read every layer of the LLM.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from spar.common.config import read_json, to_dict, write_json
from spar.common.device import native_dtype
from spar.common.errors import InputError
from spar.common.files import atomic_file
from spar.common.process_group import ONE_PROCESS, ProcessGroup
from spar.common.progress import Advance
from spar.data.loader import any_number_of_workers, read_again, to_pixels
from spar.data.samples import BadSample, check_references
from spar.data.sources import DataSource
from spar.models.tokenizer import UnifiedTokenizer
from spar.processing.images import open_training_image, to_size
from spar.training.distributed import whole_tensor

log = logging.getLogger("spar.training")

HEADER, FORMAT, FORMAT_VERSION = "cache.json", "spar-features", 1
ROWS = 1024  # samples a file


def sample_id(identity: str, number: int) -> int:
    """63 bits of a sample's place: its source's identity, wherever the files lie, and its number there.

    Keys would not do: shards of one set may begin anew with 00000.
    """
    return int.from_bytes(hashlib.blake2b(f"{identity}\0{number}".encode(), digest_size=8).digest(), "little") >> 1


def cache_key(tokenizer: UnifiedTokenizer, side: int, sources: list[DataSource], *, profiles: bool = True) -> str:
    """What the features depend on; `profiles` is whether images were converted to sRGB by their colour profiles."""
    forms = {name: to_dict(getattr(tokenizer.config, name)) for name in ("vision", "streams")}  # what no weight tells
    samples = sorted(source.identity for source in sources)
    digest = hashlib.sha256(f"{FORMAT_VERSION} {side} {profiles} {samples} {json.dumps(forms)}".encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        if not name.startswith("decoder."):
            digest.update(name.encode())
            digest.update(whole_tensor(value.detach()).float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode(tokenizer: UnifiedTokenizer, pixels: Tensor) -> dict[str, Tensor]:
    """The features of images `[B, 3, S, S]` in [0, 1] that a unified step reads: `f_v`, and the normalised latent."""
    latents = tokenizer.encode(pixels)
    return {"f_v": latents.f_v, "latent": tokenizer.normalize(latents.z_f)}


@torch.no_grad()
def write_cache(
    tokenizer: UnifiedTokenizer, sources: list[DataSource], folder: Path, *, side: int, batch: int = 32,
    workers: int = 0, precision: torch.dtype | None = None, profiles: bool = True, advance: Advance | None = None,
    group: ProcessGroup = ONE_PROCESS,
) -> int:  # fmt: skip
    """Compute the features of every sample; a cache that was broken off goes on where it stands. Returns the bad ones.
    Of several processes each writes its share of the files.

    Raises:
        InputError: a folder that holds a cache of another key, or something else.
    """
    device, key = next(tokenizer.parameters()).device, cache_key(tokenizer, side, sources, profiles=profiles)
    precision = precision or native_dtype(device)
    kept = "float32" if precision == torch.float32 else "bfloat16"
    header: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION, "key": key, "side": side}
    header |= {"complete": False, "precision": kept}
    group.main_only(lambda: _begin(folder, header))
    total = sum(len(source) for source in sources)
    files: list[tuple[Path, DataSource, range]] = []
    for source in sources:
        for damage in source.damage if group.main else ():
            log.warning("%s: %s", source.name, damage)
        name = hashlib.blake2b(source.identity.encode(), digest_size=8).hexdigest()  # in whatever order the sets come
        for start in range(0, len(source), ROWS):
            path = folder / f"{name}-{start // ROWS:06}.safetensors"
            files.append((path, source, range(start, min(start + ROWS, len(source)))))
    written = set(group.main_only(lambda: [path.name for path, _, _ in files if path.exists()]))
    own, done = group.share([file for file in files if file[0].name not in written]), 0
    for path, source, indices in own:
        pictures = _Pictures(source, side, batch, indices.stop, profiles)
        with any_number_of_workers():
            loaded = iter(DataLoader(pictures, batch_size=None, sampler=indices[::batch], num_workers=workers))
        rows = [_features(tokenizer, piece, device, precision) for piece in loaded if len(piece[0])]
        if rows:
            stored = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
            with atomic_file(path) as temporary:
                save_file(stored, temporary)
        done += len(indices)
        if advance:
            advance(done, sum(len(indices) for _, _, indices in own))
    group.barrier()
    bad = total - sum(len(_ids(path)) for path, _, _ in files)
    if group.main:
        write_json(folder / HEADER, {**header, "complete": True, "samples": total - bad, "bad": bad})
    return bad


def _begin(folder: Path, header: dict[str, Any]) -> None:
    """Write the header of a cache that is not complete; InputError for a folder with something else."""
    if (folder / HEADER).exists():
        found = _check(folder, header["key"]).get("precision", "bfloat16")
        if found != header["precision"]:
            raise InputError(
                f"the cache {folder} was begun in {found}, expected {header['precision']}; write another one"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} exists and holds no cache; expected an empty or new folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / HEADER, header)


def _features(
    tokenizer: UnifiedTokenizer, piece: tuple[Tensor, Tensor, Tensor], device: torch.device, precision: torch.dtype
) -> dict[str, Tensor]:
    ids, images, references = piece
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        found = encode(tokenizer, to_pixels(images, device))
        if len(references):
            found["reference"] = tokenizer.encoder(to_pixels(references, device))
    kept = torch.float32 if precision == torch.float32 else torch.bfloat16
    return {"id": ids, **{name: value.to(kept).cpu().contiguous() for name, value in found.items()}}


class _Pictures(Dataset):
    """Samples `start` to `start + batch` of a source, decoded: ids, images, references. The bad ones are left out."""

    def __init__(self, source: DataSource, side: int, batch: int, stop: int, profiles: bool) -> None:
        self.source, self.side, self.batch, self.stop, self.profiles = source, side, batch, stop, profiles

    def __getitem__(self, start: int) -> tuple[Tensor, Tensor, Tensor]:
        ids: list[int] = []
        images: list[np.ndarray] = []
        inputs: list[np.ndarray] = []
        for index in range(start, min(start + self.batch, self.stop)):
            try:
                sample = read_again(self.source, index)
                check_references(sample)
                shown = [self._decoded(data) for data in (sample.image, *sample.input_images)]
            except (BadSample, InputError) as error:
                log.warning("%s: %s", self.source.name, error)
                continue
            ids.append(sample_id(self.source.identity, index))
            images.append(shown[0])
            inputs += shown[1:]
        return torch.tensor(ids, dtype=torch.long), _stacked(images), _stacked(inputs)

    def _decoded(self, data: bytes) -> np.ndarray:
        return np.asarray(to_size(open_training_image(data, profiles=self.profiles), self.side, self.side))


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) if pictures else torch.empty(0, 3, 0, 0)


def _ids(path: Path) -> np.ndarray:
    """The samples of a cache's file; none where all were bad, and it was not written."""
    if not path.exists():
        return np.zeros(0, np.int64)
    with safe_open(path, "pt") as file:
        return file.get_tensor("id").numpy()


def _check(folder: Path, key: str | None = None) -> dict:
    """The header of a cache; InputError where the folder is no cache, or one of another key."""
    header = read_json(folder / HEADER)
    if (header.get("format"), header.get("format_version")) != (FORMAT, FORMAT_VERSION):
        raise InputError(f"{folder} is no cache of features ({FORMAT}, version {FORMAT_VERSION})")
    if key is not None and header.get("key") != key:
        raise InputError(
            f"the cache {folder} is stale: it was made with other tokenizer weights, another size, other samples or "
            "another use of colour profiles; write it anew (spar cache) into another folder"
        )
    return header


class FeatureCache:
    """A finished cache, read row by row."""

    def __init__(self, folder: Path, key: str) -> None:
        if not _check(folder, key).get("complete"):
            raise InputError(f"the cache {folder} is not finished; go on with the same spar cache command")
        self.paths = sorted(folder.glob("*.safetensors"))
        table = [np.zeros((0, 3), np.int64)]  # a sample's id, the number of its file, its row there
        for number, ids in enumerate(map(_ids, self.paths)):
            table.append(np.stack([ids, np.full(len(ids), number), np.arange(len(ids))], axis=1))
        rows = np.concatenate(table)
        rows = rows[rows[:, 0].argsort()]
        self.ids, self.places = rows[:, 0].copy(), rows[:, 1:].copy()

    def __contains__(self, number: int) -> bool:
        place = int(np.searchsorted(self.ids, number))
        return place < len(self.ids) and int(self.ids[place]) == number

    def holds(self, identity: str, number: int) -> bool:
        """Whether a sample of a source is in the cache; a bound method, so that worker processes can be given it."""
        return sample_id(identity, number) in self

    def rows(self, ids: list[int]) -> dict[str, Tensor]:
        """The features of samples, in their order; KeyError where one is not in the cache."""
        missing = [number for number in ids if number not in self]
        if missing:
            raise KeyError(missing[0])
        found: dict[str, list[Tensor]] = {}
        for number, row in self.places[np.searchsorted(self.ids, np.array(ids))].tolist():
            with safe_open(self.paths[number], "pt") as file:
                for name in file.keys():  # noqa: SIM118 (no dictionary)
                    found.setdefault(name, []).append(file.get_slice(name)[row])
        return {name: torch.stack(values) for name, values in found.items() if name != "id"}


def kept_dtype(features: Tensor, precision: torch.dtype) -> torch.dtype:
    """The type in which frozen features are kept: that of the products they enter, but that of codes, which are whole
    numbers.
    """
    return precision if features.is_floating_point() else features.dtype


class InMemoryFeatureCache:
    """Frozen features of a fixed set of images, computed at the first use of each; numbers are kept in `precision`,
    codes as they are.
    """

    def __init__(self, precision: torch.dtype = torch.bfloat16) -> None:
        self.precision = precision
        self.rows: dict[int, int] = {}
        self.tables: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(
        self, keys: np.ndarray, pixels: Tensor, compute: Callable[[Tensor], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The features of images `[B, 3, H, W]` by their `keys` `[B]`.

        Args:
            compute: turns images `[n, 3, H, W]` into named tensors `[n, ...]`.
        """
        missing = [index for index, key in enumerate(keys.tolist()) if key not in self.rows]
        if missing:
            new, first = np.unique(keys[missing], return_index=True)
            found = compute(pixels[torch.tensor(missing)[torch.from_numpy(first)].to(pixels.device)])
            for name, rows in found.items():
                self._append(name, rows)
            self.rows |= {key: len(self.rows) + index for index, key in enumerate(new.tolist())}
        where = torch.tensor([self.rows[key] for key in keys.tolist()])
        return {name: table[where.to(table.device)] for name, table in self.tables.items()}

    def _append(self, name: str, rows: Tensor) -> None:
        """Put rows after those that are kept; the table doubles when it is full."""
        used, table = len(self.rows), self.tables.get(name)
        if table is None or used + len(rows) > len(table):
            size = (max(2 * used, used + len(rows)), *rows.shape[1:])
            larger = torch.empty(size, dtype=kept_dtype(rows, self.precision), device=rows.device)
            if table is not None:
                larger[:used] = table[:used]
            self.tables[name] = table = larger
        table[used : used + len(rows)] = rows.to(table.dtype)
