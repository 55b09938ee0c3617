"""The doctor finds what is wrong, says how to fix it, and never raises or prints."""

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from safetensors.numpy import save_file

from spar.cli import doctor
from spar.inference import pipeline


def pretend(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], requires: list[str]) -> None:
    """Let the installation look as if these versions were there and spar required these."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requires)


def plant_module(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> None:
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)


def model_folder(folder: Path) -> Path:
    (folder / "router").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"format": "spar"}))
    save_file({"a": np.ones((8, 8), np.float32), "b": np.ones(3, np.float32)}, folder / "router" / "model.safetensors")
    return folder


def test_every_finding_here_is_complete_and_nothing_is_printed(capsys):
    checks = doctor.run_checks()
    assert capsys.readouterr() == ("", "")
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert {"python", "spar-unified", "torch", "device", "bfloat16", "one step", "memory"} <= {*names}
    assert {"weights of spar", "weights of dualtoken"} <= {*names}
    for check in checks:
        assert check.found, check
        assert check.ok is not False or check.fix, f"{check} does not say how to fix it"
        assert not (check.ok and check.fix), f"{check} fixes what is right"


def test_the_environment_of_the_tests_is_supported():
    wrong = [check for check in doctor.check_dependencies() if not check.ok]
    assert not wrong
    assert doctor.check_python().ok and doctor.check_pipeline().ok


def test_versions_are_compared_with_the_installed_requirements(monkeypatch):
    pretend(
        monkeypatch,
        {"spar-unified": "0.1.0", "torch": "2.13.0+cpu", "diffusers": "0.30.0", "ruff": "1"},
        ["torch<3,>=2.10", "diffusers<0.43,>=0.42", "tyro>=1", 'ruff>=2; extra == "dev"', 'x; python_version < "3"'],
    )
    checks = {check.name: check for check in doctor.check_dependencies()}
    assert set(checks) == {"spar-unified", "torch", "diffusers", "tyro"}
    assert checks["torch"].ok
    assert checks["diffusers"].ok is False and "0.30.0" in checks["diffusers"].found
    assert Requirement(checks["diffusers"].fix.split('"')[1]).specifier.contains("0.42.1")
    assert checks["tyro"].ok is False and "not installed" in checks["tyro"].found


def test_an_absent_extra_is_for_information_and_a_present_one_is_right(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: _Metadata())
    requires = ['ruff>=2; extra == "dev"', 'lpips>=0.1; extra == "gpu"']
    pretend(monkeypatch, {"ruff": "2.1"}, requires)
    dev, gpu = doctor.check_extras()
    assert dev.ok is True and "2.1" in dev.found
    assert gpu.ok is None and "lpips" in gpu.found and "spar-unified[gpu]" in gpu.fix


class _Metadata:
    def get_all(self, key: str) -> list[str]:
        return {"Provides-Extra": ["dev", "gpu"]}[key]


def test_sources_that_were_never_installed_are_told_so(monkeypatch):
    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    for function in ("version", "requires", "metadata"):
        monkeypatch.setattr(importlib.metadata, function, absent)
    (check,) = doctor.check_dependencies()
    assert check.ok is False and "pip install -e ." in check.fix
    assert list(doctor.check_extras()) == [] and doctor.check_python().ok


def test_a_python_below_the_range_is_found(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.1")
    check = doctor.check_python()
    assert check.ok is False and "3.9.1" in check.found and "3.11" in check.fix


def test_a_library_whose_layers_refuse_our_calls_is_found(monkeypatch):
    """transformers 5.24 imported, and failed at the first token: only a step says so."""
    assert doctor.check_step().ok
    monkeypatch.setattr("spar.models.language.LayerKVCache.update", lambda self, key, value: (key, value))
    check = doctor.check_step()
    assert check.ok is False and "TypeError" in check.found and check.fix


def test_a_broken_torchvision_is_found_and_taken_out(monkeypatch, tmp_path):
    message = "operator torchvision::nms does not exist"
    plant_module(monkeypatch, tmp_path, "torchvision", f"raise RuntimeError({message!r} + chr(10) + 'more')")
    check = doctor.check_torchvision()
    assert check.ok is False and check.found.endswith(message) and check.fix == "pip uninstall torchvision"


def test_a_torchvision_that_works_is_left_alone(monkeypatch, tmp_path):
    plant_module(monkeypatch, tmp_path, "torchvision", "")
    check = doctor.check_torchvision()
    assert check.ok is True and not check.fix
    sys.modules.pop("torchvision")


def test_a_torch_that_does_not_import_is_an_answer_and_no_crash(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # what Python's import system reads as "cannot be imported"
    assert doctor.check_device().ok is False
    assert doctor.check_bfloat16().ok is False


@pytest.mark.parametrize(("speeds", "ok"), [((200.0, 100.0), True), ((10.0, 100.0), None)])
def test_slow_bfloat16_is_advice_and_no_fault(monkeypatch, speeds, ok):
    left = list(speeds)  # bfloat16 is timed first
    monkeypatch.setattr("spar.common.device.measure_peak", lambda device, dtype, side: left.pop(0))
    check = doctor.check_bfloat16()
    assert check.ok is ok and bool(check.fix) is (ok is None)


def test_the_doctor_looks_where_the_pipeline_loads_from():
    assert doctor.BUNDLED_MODELS["spar"] == pipeline.BUNDLED


def test_whole_weights_are_counted(tmp_path):
    check = doctor.check_weights(model_folder(tmp_path / "weights"))
    assert check.ok and check.found.startswith("2 tensors in 1 files")


def test_absent_weights_are_found(tmp_path):
    assert doctor.check_weights(tmp_path / "weights").ok is False
    folder = model_folder(tmp_path / "partial")
    (folder / "config.json").unlink()
    assert doctor.check_weights(folder).ok is False


@pytest.mark.parametrize("name", ["router/model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", [lambda data: data[:-4], lambda data: b"", lambda data: b"version https://git-lfs"])
def test_damaged_weights_are_found_and_named(tmp_path, name, damage):
    folder = model_folder(tmp_path / "weights")
    path = folder / name
    path.write_bytes(damage(path.read_bytes()))
    check = doctor.check_weights(folder)
    assert check.ok is False and str(path) in check.found and "\n" not in check.found


def test_a_temporary_folder_that_cannot_be_written_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.tempfile, "tempdir", str(tmp_path / "absent"))
    check = doctor.check_temporary()
    assert check.ok is False and "TMPDIR" in check.fix


def test_little_room_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 2**62)
    monkeypatch.setattr(doctor, "ENOUGH_MEMORY", 2**62)
    assert doctor.check_disk(tmp_path).ok is False
    assert not doctor.check_memory().ok


def test_little_shared_memory_is_said_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ENOUGH_SHARED", 2**62)
    (found,) = doctor.check_shared_memory(tmp_path)
    assert found.ok is None and str(tmp_path) in found.found and "--shm-size" in found.fix
    monkeypatch.setattr(doctor, "ENOUGH_SHARED", 1)
    assert [check.ok for check in doctor.check_shared_memory(tmp_path)] == [True]
    assert list(doctor.check_shared_memory(tmp_path / "none")) == []


def test_memory_is_what_the_system_or_its_container_leaves(tmp_path):
    assert doctor.available_memory(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 4000 kB\nMemAvailable:    3000 kB\n")
    assert doctor.available_memory(tmp_path) == 3000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.current").write_text("1048576\n")
    (group / "memory.max").write_text("max\n")
    assert doctor.available_memory(tmp_path) == 3000 * 1024
    (group / "memory.max").write_text("2097152\n")
    assert doctor.available_memory(tmp_path) == 1048576
