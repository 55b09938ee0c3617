"""One default of the device for everything, and its name."""

import inspect
from dataclasses import fields

import pytest
import torch

from spar.cli import doctor
from spar.cli.task_arguments import GenerateArguments
from spar.cli.train_arguments import CacheArguments, TrainArguments
from spar.common.cpu import cpu_name
from spar.common.device import _warn_of_gpu, choose_device, device_name, native_dtype
from spar.common.errors import InputError
from spar.inference.base import choose_device_and_dtype
from spar.training.distributed import ParallelismConfig
from spar.training.objectives.base import StepContext
from spar.training.optimizer import orthogonalize
from spar.training.trainer import execute, train


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_the_default_is_cuda_where_there_is_one(monkeypatch, there, chosen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("spar.common.device.device_failure", lambda device: None)
    assert choose_device() == torch.device(chosen)
    assert choose_device_and_dtype(None, "float16") == (torch.device(chosen), torch.float16)


def test_every_verb_and_training_leave_the_device_to_that_default():
    for kind in (TrainArguments, CacheArguments, GenerateArguments):
        assert {item.name: item.default for item in fields(kind)}["device"] is None
    for function in (train, execute):
        assert inspect.signature(function).parameters["device"].default is None


def test_a_given_device_is_checked():
    assert choose_device("cpu") == choose_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(InputError, match="expected one that is here, got 'cuda:77'"):
        choose_device("cuda:77")


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU that is there, holds memory, and has no code for a sum."""
    message = "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might be"

    class OnTheGpu:
        def __add__(self, other):
            raise RuntimeError(message)

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name in ("ones", "empty"):
        make = getattr(torch, name)

        def made(*shape, device=None, make=make, **keywords):
            return OnTheGpu() if str(device).startswith("cuda") else make(*shape, device=device, **keywords)

        monkeypatch.setattr(torch, name, made)
    _warn_of_gpu.cache_clear()


def test_a_gpu_that_computes_nothing_is_refused_and_not_the_default(old_gpu, caplog):
    with pytest.raises(InputError, match=r"that is here, got 'cuda' \(here: cpu, cuda; CUDA error: no kernel"):
        choose_device("cuda")
    assert choose_device() == choose_device(None) == torch.device("cpu")
    (warning,) = caplog.records
    assert "the CPU is used, since the GPU does not compute (CUDA error: no kernel image" in warning.getMessage()
    with pytest.raises(InputError, match="got 'meta'"):
        choose_device("meta")


def test_the_doctor_says_that_a_gpu_computes_nothing(old_gpu):
    check = doctor.check_device()
    assert check.ok is False and "no kernel image is available for execution on the device" in check.found
    assert "install the build of torch" in check.fix and "\n" not in check.found


def test_a_device_is_shown_with_what_it_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")
    assert device_name(torch.device("cuda:1")) == "cuda:1 (GPU 1)"
    assert device_name(torch.device("cpu")) == f"cpu ({cpu_name()})"


@pytest.mark.parametrize(
    ("where", "hardware", "dtype"),
    [
        ("cpu", True, torch.bfloat16),
        ("cpu", False, torch.float32),
        ("cuda", (8, 0), torch.bfloat16),
        ("cuda", (7, 5), torch.float32),
        ("mps", True, torch.float32),
    ],
)
def test_training_and_inference_multiply_in_what_the_hardware_has(monkeypatch, where, hardware, dtype):
    monkeypatch.setattr("spar.common.device.has_native_bfloat16", lambda: hardware)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: hardware)
    device = torch.device(where)
    assert native_dtype(device) == ParallelismConfig().dtype(device) == dtype
    for said, asked in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        assert ParallelismConfig(precision=said).dtype(device) == asked


def test_what_chooses_by_itself_multiplies_no_bfloat16_on_a_cpu_without_it(monkeypatch):
    monkeypatch.setattr("spar.common.device.has_native_bfloat16", lambda: False)
    assert not StepContext(None, None, None, None, torch.device("cpu")).autocast()._enabled
    assert choose_device_and_dtype("cpu", None)[1] == torch.float32
    matrices = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    exact, half = orthogonalize(matrices), orthogonalize(matrices.bfloat16()).float()
    assert not torch.equal(exact, exact.bfloat16().float())
    torch.testing.assert_close(exact, half, atol=0.03, rtol=0.03)
