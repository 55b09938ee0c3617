"""What a stranger installs: the wheel and the sdist hold what they should, and the wheel runs where no sources are.

Nothing is downloaded: the installed builder makes them, and the clean environment is shown the libraries of this one.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

import spar

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STEM = f"spar_unified-{spar.__version__}"
INFO = f"{STEM}.dist-info"
PROMPT = "a large red circle to the left of a small blue star"


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints and warns of, run in a folder and an environment that do not name the sources."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def build(target: str, sources: Path, folder: Path) -> Path:
    """The `wheel` or `sdist` that the build backend makes of a folder of sources."""
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder, cwd=sources)
    (made,) = folder.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    sdist = build("sdist", ROOT, folder / "made")
    assert sdist.name == f"{STEM}.tar.gz"
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / STEM


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    return message_from_bytes(contents(wheel)[f"{INFO}/METADATA"])


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment that has the package from the wheel, and all else from this one.

    A folder that a .pth file names is searched, but its own .pth files are not read: so the editable install's way to
    the sources stays closed.
    """
    folder = tmp_path_factory.mktemp("clean")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", "--disable-pip-version-check", wheel, cwd=folder)
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    shown = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(own) / "libraries.pth").write_text("".join(f"{path}\n" for path in sorted(shown)), encoding="utf-8")
    return folder / "bin"


# The archives


def test_the_wheel_is_named_as_the_package_is_asked_for(wheel, metadata):
    assert wheel.name == f"{STEM}-py3-none-any.whl"
    assert metadata["Name"] == "spar-unified" == spar.DISTRIBUTION
    assert metadata["Version"] == spar.__version__
    assert metadata["License-Expression"] == "Apache-2.0" and metadata.get_all("License-File") == ["LICENSE"]
    assert metadata.get_payload(decode=True) == (ROOT / "README.md").read_bytes()


def test_the_wheel_asks_for_the_ranges_of_pyproject(metadata):
    expected = [Requirement(line) for line in PROJECT["dependencies"]]
    for extra, lines in PROJECT["optional-dependencies"].items():
        expected += [Requirement(f'{line}; extra == "{extra}"') for line in lines]
    asked = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {*asked} == {*expected}
    assert {*metadata.get_all("Provides-Extra")} == {*PROJECT["optional-dependencies"]}
    assert metadata["Requires-Python"] == PROJECT["requires-python"]


def test_the_wheel_holds_the_package_with_its_weights_and_nothing_else(wheel):
    held = contents(wheel)
    package = {name: data for name, data in held.items() if not name.startswith(f"{INFO}/")}
    assert {*package} == {
        path.relative_to(SOURCE).as_posix()
        for path in (SOURCE / "spar").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert all(data == (SOURCE / name).read_bytes() for name, data in package.items())
    weights = {name for name in package if name.startswith("spar/assets/")}
    parts = {
        "weights": {"tokenizer", "language", "router", "connector", "denoiser"},
        "dualtoken": {"tokenizer", "language", "embedder", "pixel_head", "semantic_head"},
    }
    for folder, expected in parts.items():
        own = {PurePosixPath(name) for name in weights if name.startswith(f"spar/assets/{folder}/")}
        assert {path.parent.name for path in own if path.suffix == ".safetensors"} == expected
        assert {"config.json", "manifest.json", "README.md", "metrics.jsonl"} <= {path.name for path in own}
    templates = {name for name in package if name.startswith("spar/reporting/templates/")}
    assert "spar/reporting/templates/report.html" in templates
    studies = {name for name in package if re.fullmatch(r"spar/evaluation/studies/[a-z-]+\.yaml", name)}
    assert "spar/evaluation/studies/routing.yaml" in studies
    others = {*package} - weights - templates - studies - {"spar/evaluation/robustness.jsonl"}
    assert "spar/py.typed" in others, "type checkers ignore the types of a package without it"
    assert all(name.endswith(".py") for name in others - {"spar/py.typed"}), "data of no known kind"
    named = [name for name in held if re.search(r"(^|/)(tests?|conftest|test_\w+)(\.py)?(/|$)", name)]
    assert named == []


def test_the_wheel_brings_one_program(wheel):
    text = contents(wheel)[f"{INFO}/entry_points.txt"].decode()
    groups = {"console_scripts": PROJECT["scripts"], **PROJECT["entry-points"]}
    listed = [
        f"[{group}]" + "".join(f" {name} = {at}" for name, at in groups[group].items()) for group in sorted(groups)
    ]
    assert text.split() == " ".join(listed).split() and [*PROJECT["scripts"]] == ["spar"]


def test_the_sdist_builds_the_same_wheel(unpacked, wheel, tmp_path):
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "Makefile", "tests/conftest.py"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes(), name
    assert contents(build("wheel", unpacked, tmp_path / "again")) == contents(wheel)


# The wheel, installed


def test_the_package_comes_from_the_wheel_and_not_from_the_sources(clean, tmp_path):
    code = "import spar, importlib.metadata as m; print(spar.__file__, m.distribution('spar-unified').locate_file(''))"
    places = run(clean / "python", "-c", code, cwd=tmp_path).split()
    assert len(places) == 2
    for path in places:
        assert Path(path).resolve().is_relative_to(clean.parent.resolve())


def test_the_installed_program_names_its_verbs(clean, tmp_path):
    output = run(clean / "spar", "--help", cwd=tmp_path)
    assert all(re.search(rf"\b{verb}\b", output) for verb in ("train", "generate", "edit", "understand", "doctor"))
    assert run(clean / "spar", "--version", cwd=tmp_path).split()[-1] == spar.__version__


def test_the_installed_program_draws_what_the_sources_draw(clean, tmp_path):
    output = run(clean / "spar", "generate", PROMPT, "--seed", "0", "-o", tmp_path / "out.png", cwd=tmp_path)
    assert "out.png" in output and "warning" not in output.lower()
    expected = spar.SparPipeline.from_pretrained(device="cpu").generate(PROMPT, seed=0).images[0]
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size == expected.size
        difference = np.abs(np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1 and np.asarray(expected).std() > 10


def test_the_installed_doctor_finds_the_bundled_weights_and_nothing_wrong(clean, tmp_path):
    output = run(clean / "spar", "doctor", cwd=tmp_path)
    assert re.search(rf"spar-unified\W+{re.escape(spar.__version__)}", output)
    assert "tensors in 5 files" in output and "an image is generated and edited, a question answered" in output
