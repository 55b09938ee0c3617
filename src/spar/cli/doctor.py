"""Checks of the installation for `spar doctor`: what it contains, what is wrong and how to fix it.

`run_checks` returns findings and neither prints nor raises on a broken installation. The supported ranges are read from
the installed package's own requirements, so that pyproject.toml is their only place. Heavy libraries are imported
inside the checks that need them, so that an installation without torch still gets a result.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from spar import DISTRIBUTION
from spar.checkpoints.bundled import BUNDLED_MODELS
from spar.cli.console import show_bytes
from spar.common.cpu import bfloat16_instructions
from spar.common.errors import first_line, install_command
from spar.common.threads import SETTINGS

if TYPE_CHECKING:
    import torch

MATMUL_SIDE = {"cpu": 768, "mps": 2048, "cuda": 4096}  # large enough to be busy, milliseconds at most
ENOUGH_DISK = 2 * 2**30  # bytes: a run of the shapes recipe keeps 0.6 GiB of images and its state at each stage
ENOUGH_MEMORY = 2**30  # bytes: the libraries take 0.4 GiB; then the weights and a batch of images
ENOUGH_SHARED = 2**30  # bytes: four data workers, two batches each of 128 images of 448 pixels, are 0.6 GiB
SHARED_MEMORY = Path("/dev/shm")
REINSTALL = "reinstall spar, in a fresh virtual environment"


@dataclass(frozen=True)
class Check:
    """One finding.

    `ok`: True, right; False, wrong, with a remedy in `fix`; None, for information: a missing optional part, or a
    setting that `fix` (if not empty) would improve.
    """

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def run_checks() -> list[Check]:
    """All findings, in the best order of fixing. Takes seconds: it imports torch and the pipeline."""
    return [
        check_python(),
        *check_dependencies(),
        check_torchvision(),
        check_pipeline(),
        check_device(),
        check_bfloat16(),
        *(check_weights(folder, f"weights of {name}") for name, folder in BUNDLED_MODELS.items()),
        check_step(),
        *check_extras(),
        check_temporary(),
        check_disk(Path.cwd()),
        check_memory(),
        *check_shared_memory(SHARED_MEMORY),
    ]


def check_python() -> Check:
    """Compare the interpreter with the package's `Requires-Python`."""
    try:
        required = importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        required = ""
    version = platform.python_version()
    if SpecifierSet(required).contains(version, prereleases=True):
        return Check("python", True, f"{version} on {platform.system()} {platform.machine()}")
    return Check("python", False, f"{version}; expected {required}", f"install Python {required} and then {REINSTALL}")


def requirements(extra: str = "") -> list[Requirement]:
    """Requirements of the installed package, or only those that an extra adds."""
    parsed = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    always = [r for r in parsed if r.marker is None or r.marker.evaluate({"extra": ""})]
    if not extra:
        return always
    return [r for r in parsed if r not in always and r.marker is not None and r.marker.evaluate({"extra": extra})]


def check_dependencies() -> Iterator[Check]:
    """Check spar itself and each required library: installed, and within the supported range."""
    try:
        required = requirements()
    except importlib.metadata.PackageNotFoundError:
        yield Check(DISTRIBUTION, False, "not installed, run from its sources", "pip install -e . in their folder")
        return
    yield Check(DISTRIBUTION, True, importlib.metadata.version(DISTRIBUTION))
    for requirement in required:
        yield _check_requirement(requirement)


def _check_requirement(requirement: Requirement) -> Check:
    name, expected = requirement.name, str(requirement.specifier)
    try:
        found = importlib.metadata.version(name)
        if requirement.specifier.contains(found, prereleases=True):
            return Check(name, True, found)
    except importlib.metadata.PackageNotFoundError:
        found = "not installed"
    return Check(name, False, f"{found}; expected {expected}", f'pip install "{name}{expected}"')


def check_torchvision() -> Check:
    """Check torchvision, which is not needed, but makes other libraries fail if it is broken.

    Its wheel from the registry is built for a CUDA build of torch and fails with a CPU build.
    """
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", True, "not installed, and not needed")
    failure = _import_error("torchvision")
    if failure is None:
        return Check("torchvision", True, "installed and working; not needed")
    return Check("torchvision", False, f"installed but broken: {failure}", "pip uninstall torchvision")


def check_pipeline() -> Check:
    """Check that the four tasks and all their libraries import."""
    failure = _import_error("spar.inference.pipeline")
    if failure is None:
        return Check("pipeline", True, "imports")
    return Check("pipeline", False, f"does not import: {failure}", f"fix what is listed above; else {REINSTALL}")


def check_step() -> Check:
    """Run one step of each task where a verb would, since a library that imports may still refuse our calls."""
    try:
        from spar.inference.pipeline import SparPipeline

        pipe = SparPipeline.from_pretrained()
        image = pipe.generate("a red circle", seed=0, num_inference_steps=1).images[0]
        pipe.edit(image, "remove the red circle", seed=0, num_inference_steps=1)
        pipe.understand(image, "what color is the background?", max_new_tokens=2)
    except Exception as error:  # a broken installation raises anything
        return Check("one step", False, f"fails: {type(error).__name__}: {first_line(error)}",
                     f"fix what is listed above; else {REINSTALL}")
    return Check("one step", True, f"an image is generated and edited, a question answered, on {pipe.device}")


def check_device() -> Check:
    """Report the device of the model."""
    failure = _import_error("torch")
    if failure is not None:
        return Check("device", False, f"torch does not import: {failure}", REINSTALL)
    import torch

    from spar.common.device import device_failure

    device = best_device()
    if failure := device_failure(device):
        return Check("device", False, f"{device} is here, but does not compute, so the CPU is used: {failure}",
                     "install the build of torch that has this GPU's architecture (https://pytorch.org)")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return Check("device", True, f"cuda: {properties.name}, {show_bytes(properties.total_memory)}")
    if device.type == "mps":
        return Check("device", True, "mps (give --device mps; the default is the CPU)")
    chosen = ", ".join(f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ) or "as OpenMP waits"
    found = f"cpu, {torch.get_num_threads()} threads of {os.cpu_count()} cores ({chosen}), one for a small image"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        return Check("device", None, f"{found}; an NVIDIA driver is here, but torch is a CPU build",
                     "install a CUDA build of torch to use the GPU")
    return Check("device", True, found)


def best_device() -> "torch.device":
    """CUDA if available, then Apple's GPU, then the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def check_bfloat16() -> Check:
    """Compare bfloat16 with float32: the hardware's instructions, and one timed matrix product of each."""
    if _import_error("torch") is not None:
        return Check("bfloat16", False, "torch does not import", REINSTALL)
    import torch

    from spar.common.device import measure_peak

    device = best_device()
    hardware = device.type
    if device.type == "cpu":
        hardware = ", ".join(bfloat16_instructions()) or "no instructions named"
    side = MATMUL_SIDE[device.type]
    try:
        half, full = (measure_peak(device, dtype, side) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    except RuntimeError as error:
        return Check("bfloat16", None, f"{hardware}; not supported: {first_line(error)}", "use float32 here")
    found = f"{hardware}; {half / full:.1f} times the speed of float32 ({half:,.0f} against {full:,.0f} GFLOP/s)"
    if half >= full:
        return Check("bfloat16", True, found)
    return Check("bfloat16", None, found, "float32 is faster here")


def check_weights(folder: Path, name: str = "weights") -> Check:
    """Check that all JSON files of a bundled model parse and each safetensors file has the length that its header
    gives.
    """
    fix = f"{REINSTALL}, or train your own weights (spar train)"
    files = sorted(folder.rglob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        return Check(name, False, f"no model in {folder}", fix)
    from safetensors import SafetensorError, safe_open

    tensors = 0
    for path in [*files, *folder.rglob("*.json")]:
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
                continue
            with safe_open(path, framework="numpy") as file:
                tensors += len(file.keys())
        except (OSError, ValueError, SafetensorError) as error:
            return Check(name, False, f"{path} is damaged: {first_line(error)}", fix)
    size = sum(path.stat().st_size for path in files)
    return Check(name, True, f"{tensors} tensors in {len(files)} files, {size / 1e6:.1f} MB, in {folder}")


def check_extras() -> Iterator[Check]:
    """Check each optional extra for missing libraries."""
    try:
        extras = importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for extra in extras:
        checks = [_check_requirement(requirement) for requirement in requirements(extra)]
        wrong = [f"{check.name} {check.found}" for check in checks if not check.ok]
        if wrong:
            yield Check(f"extra {extra}", None, "; ".join(wrong), f"{install_command(extra)}, if you want it")
        else:
            yield Check(f"extra {extra}", True, ", ".join(f"{check.name} {check.found}" for check in checks))


def check_temporary() -> Check:
    """Check that temporary files can be written."""
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"spar")
            file.flush()
            return Check("temporary folder", True, str(Path(file.name).parent))
    except OSError as error:
        fix = "set TMPDIR to a folder that can be written and has room"
        return Check("temporary folder", False, f"cannot be written: {error.strerror or error}", fix)


def check_disk(folder: Path) -> Check:
    """Check the free space of the folder of runs and images."""
    free = shutil.disk_usage(folder).free
    return _check_room("disk", free, ENOUGH_DISK, f"free in {folder}", "make room, or work in a folder on another disk")


def check_memory() -> Check:
    """Check the available memory, by the system's report and by the container's limit."""
    free = available_memory()
    if free is None:
        return Check("memory", None, "not reported by this system")
    return _check_room("memory", free, ENOUGH_MEMORY, "available", "end other programs, or raise the container's limit")


def check_shared_memory(folder: Path) -> Iterator[Check]:
    """Check the room for batches of data workers, where the system has such a folder. Docker's default is 64 MB."""
    if folder.is_dir():
        free = shutil.disk_usage(folder).free
        found = f"{show_bytes(free)} free in {folder}"
        if free >= ENOUGH_SHARED:
            yield Check("shared memory", True, found)
        else:
            yield Check("shared memory", None, f"{found}, little for data workers at full size",
                        "give the container more (docker run --shm-size), or train with --data.workers 0")


def _check_room(name: str, free: int, enough: int, where: str, fix: str) -> Check:
    found = f"{show_bytes(free)} {where}"
    if free >= enough:
        return Check(name, True, found)
    return Check(name, False, f"{found}; expected {show_bytes(enough)}", fix)


def available_memory(system: Path = Path("/")) -> int | None:
    """Available bytes of memory, None if the system does not report them. `system` is its root folder."""
    limits = []
    try:
        lines = (system / "proc/meminfo").read_text().splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        pass
    try:
        group = system / "sys/fs/cgroup"
        limits.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no cgroup, or no limit ("max")
        pass
    return min(limits, default=None)


def _import_error(module: str) -> str | None:
    """The error of importing a module, in one line, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken installation raises anything
        return f"{type(error).__name__}: {first_line(error)}"
    return None
