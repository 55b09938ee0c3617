"""Images a second of the loader against a bare Pillow loop in as many processes, on generated shards.

The loop reads the same bytes, decodes, converts to RGB, crops and resizes to the same size and makes an array, which it
drops; the loader also shuffles, checks, reads captions, collates and transfers batches. Both run in turns; the median
of each counts. The last line is JSON: `ratio` is the loader's images a second over the loop's; `cpu_ratio` the loop's
CPU seconds per image over the loader's, which other load hardly affects; `loader` and `bare` have both of each run.
"""

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from spar.checkpoints.model_header import versions
from spar.data.loader import Loader
from spar.data.mixture import Mixture
from spar.data.sources import DataSource, open_source
from spar.training.bundle import hardware_info

SIDE = 448
SIZES = ((1024, 1024), (1024, 768), (640, 480), (512, 512))


def write_shards(folder: Path, count: int) -> None:
    """Images with the detail of photographs: smoothed noise, JPEG of quality 90."""
    rng = np.random.default_rng(0)
    for shard in range(4):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as out:
            for number in range(shard, count, 4):
                width, height = SIZES[number // 4 % len(SIZES)]
                coarse = Image.fromarray(rng.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
                for name, data in ((f"{number:08d}.jpg", buffer.getvalue()), (f"{number:08d}.txt", b"an image")):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))


def bare(source: DataSource, numbers: range) -> int:
    """Decode, crop to the square and resize, as any pipeline must."""
    for number in numbers:
        with Image.open(io.BytesIO(source.read(number).image)) as image:
            image = image.convert("RGB")
        edge = min(image.size)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        box = (left, top, left + edge, top + edge)
        np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))
    return len(numbers)


def cpu_seconds() -> float:
    """CPU seconds of this process and of its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def run_bare(source: DataSource, images: int, workers: int) -> tuple[float, float]:
    """(images a second, CPU seconds an image) of processes that share the samples evenly; their start is not timed."""
    parts = [(source, range(first, images, 4 * workers)) for first in range(4 * workers)]
    before = cpu_seconds()
    with multiprocessing.Pool(workers) as pool:
        warm = sum(pool.starmap(bare, [(source, range(2))] * workers))
        start = time.perf_counter()
        done = sum(pool.starmap(bare, parts, chunksize=1))
        rate = done / (time.perf_counter() - start)
        pool.close()
        pool.join()
    return rate, (cpu_seconds() - before) / (done + warm)


def run_loader(source: DataSource, images: int, workers: int, batch: int) -> tuple[float, float]:
    """The same of the loader, timed from the first batch on."""
    mixture = Mixture([source], [1], batch=batch, buckets=((SIDE, SIDE),))
    before = cpu_seconds()
    batches = Loader(mixture, workers=workers).batches(0, images // batch + workers)
    warm = sum(len(next(batches).images) for _ in range(workers))
    start = time.perf_counter()
    done = sum(len(batch.images) for batch in batches)
    rate = done / (time.perf_counter() - start)
    del batches  # joins the workers
    return rate, (cpu_seconds() - before) / (done + warm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    loops, loaders = [], []
    with tempfile.TemporaryDirectory() as folder:
        write_shards(Path(folder), args.images)
        source = open_source(folder)
        for _ in range(args.repeats):
            loops.append(run_bare(source, args.images, args.workers))
            loaders.append(run_loader(source, args.images, args.workers, args.batch))
    (loop, loop_cpu), (loader, loader_cpu) = (
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in (loops, loaders)
    )
    for name, rate, cpu in (("bare loop", loop, loop_cpu), ("loader", loader, loader_cpu)):
        print(f"{name}: {rate:.1f} images/s, {1000 * cpu:.2f} ms of CPU an image, {args.workers} workers")
    result = {
        "benchmark": "data_loader", "loader": loaders, "bare": loops, "ratio": loader / loop,
        "cpu_ratio": loop_cpu / loader_cpu, "load_average": os.getloadavg()[0], "workers": args.workers,
        "batch": args.batch, "images": args.images, "side": SIDE,
    }  # fmt: skip
    print(json.dumps({**result, "machine": hardware_info(), "versions": versions()}))


if __name__ == "__main__":
    main()
