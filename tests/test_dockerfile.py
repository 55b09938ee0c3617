"""The Dockerfile builds what it says: its steps run here, without Docker and without a network.

What is left out: the base image, the download of torch and of the other libraries (an environment with nothing but the
package is shown those of this one), and the user, whom only Docker can make.
"""

import fnmatch
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STEPS = [line.split(maxsplit=1) for line in re.sub(r"^#.*\n", "", TEXT, flags=re.M).splitlines() if line]
TOKEN = "a-token-for-the-tests-0123456789"


def package_test():
    """tests/test_package.py, as a module: its `PROJECT` and `run`."""
    spec = importlib.util.spec_from_file_location("package_test", ROOT / "tests" / "test_package.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PACKAGE = package_test()


def steps(name: str) -> list[str]:
    return [text for step, text in STEPS if step == name]


def command(name: str) -> list[str]:
    """The words of the last CMD, or of the HEALTHCHECK's."""
    (text,) = steps(name)
    return json.loads(text[text.index("[") :])


def copied() -> list[str]:
    """What the COPY steps take from the sources."""
    words = [text.split() for text in steps("COPY")]
    return [name for own in words if not own[0].startswith("--from") for name in own[:-1]]


def test_the_base_images_have_a_supported_python():
    versions = [re.fullmatch(r"python:([\d.]+)-slim(?: AS \w+)?", text)[1] for text in steps("FROM")]
    assert len(set(versions)) == 1
    assert versions[0] in SpecifierSet(PACKAGE.PROJECT["requires-python"])


def test_the_server_is_no_root_and_needs_a_token():
    names = [step for step, _ in STEPS]
    assert steps("USER") == ["spar"] and "useradd" in steps("RUN")[-1]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))
    words = command("CMD")
    assert words[:2] == ["spar", "serve"] and words[words.index("--host") + 1] == "0.0.0.0"
    assert "--token-file" in words and TEXT.count("SPAR_API_TOKEN") == 0  # no secret in the image
    (port,) = steps("EXPOSE")
    assert words[words.index("--port") + 1] == port and f":{port}/health" in command("HEALTHCHECK")[-1]


def test_the_context_is_what_the_steps_copy():
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    kept = {pattern[2:] for pattern in patterns if pattern.startswith("!/")}
    assert "*" in patterns and kept == {*copied()}
    assert all((ROOT / name).exists() for name in kept)
    assert not any(fnmatch.fnmatch(name, ".*") for name in kept)


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Iterator[tuple[Path, dict[str, str]]]:
    """The folder of programs that the RUN steps make, and the environment in which they run."""
    context, folder = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("image")
    for name in copied():
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, context / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, context / name)
    wheel, torch, install, _user = steps("RUN")
    assert "$(grep '^torch==' constraints.txt)" in torch

    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "NO_COLOR": "1", "COLUMNS": "200"}

    def step(text: str, programs: Path, **more: str) -> str:
        own = environment | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"} | more
        text = text.replace("/wheels", str(folder / "wheels"))
        done = subprocess.run(
            ["sh", "-ec", text], cwd=context, env=own, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    # The builder is this environment's: pip would download its own.
    step(wheel, Path(sys.executable).parent, PIP_NO_BUILD_ISOLATION="false")
    assert [path.suffix for path in (folder / "wheels").iterdir()] == [".whl"]
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    programs = folder / "venv" / "bin"
    step(install, programs, PIP_NO_DEPS="1")
    own = step("python -c \"import sysconfig; print(sysconfig.get_path('purelib'))\"", programs).strip()
    shown = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(own) / "libraries.pth").write_text("".join(f"{path}\n" for path in sorted(shown)), encoding="utf-8")
    yield programs, environment


@pytest.mark.slow
def test_the_extra_that_is_installed_is_the_servers(image):
    words = steps("RUN")[2]
    assert words.endswith('[serve]"') and "serve" in PACKAGE.PROJECT["optional-dependencies"]
    programs, environment = image
    code = "import spar; print(spar.__file__)"
    place = subprocess.run([programs / "python", "-c", code], env=environment, capture_output=True, text=True).stdout
    assert Path(place.strip()).is_relative_to(programs.parent)


@pytest.mark.slow
def test_the_command_serves_until_it_is_ended(image, tmp_path):
    programs, environment = image
    words = command("CMD")
    token = tmp_path / "token"
    token.write_text(TOKEN)
    words[words.index("--port") + 1] = "0"
    words[words.index("--token-file") + 1] = str(token)
    environment = environment | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [programs / words[0], *words[1:]], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        port = next(found[1] for line in process.stdout if (found := re.search(r"http://[^:/]+:(\d+)", line)))
        check = [part.replace(":8000", f":{port}") for part in command("HEALTHCHECK")]
        assert check != command("HEALTHCHECK")
        done = subprocess.run(check, env=environment, timeout=60, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        models = f"http://127.0.0.1:{port}/v1/models"
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(models, timeout=30)
        request = urllib.request.Request(models, headers={"Authorization": f"Bearer {TOKEN}"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert json.load(answer)["data"][0]["id"] == "spar"
        process.send_signal(signal.SIGTERM)  # what `docker stop` sends
        process.stdout.read()
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    done = subprocess.run(check, env=environment, timeout=60, capture_output=True)
    assert done.returncode != 0  # an ended server is not healthy
