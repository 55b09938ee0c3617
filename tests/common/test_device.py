"""One default of the device for everything, and its name."""

import inspect
from dataclasses import fields

import pytest
import torch

from spar.cli.task_arguments import GenerateArguments
from spar.cli.train_arguments import CacheArguments, TrainArguments
from spar.common.cpu import cpu_name
from spar.common.device import choose_device, device_name
from spar.common.errors import InputError
from spar.inference.base import choose_device_and_dtype
from spar.training.trainer import execute, train


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_the_default_is_cuda_where_there_is_one(monkeypatch, there, chosen):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
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


def test_a_device_is_shown_with_what_it_is(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")
    assert device_name(torch.device("cuda:1")) == "cuda:1 (GPU 1)"
    assert device_name(torch.device("cpu")) == f"cpu ({cpu_name()})"
