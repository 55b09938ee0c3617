"""The bridges to evaluation kits, beside stand-ins of the kits' interfaces, written after their source.

The stand-ins have what the bridges and the kits' callers touch, with the kits' own signatures: of lmms-eval 0.7.3
(`api/model.py`, `api/instance.py`, `protocol.py`, `models/registry_v2.py`), of VLMEvalKit e8e78f0 (`vlm/base.py`,
`config.py`, `run.py`) and of GenEditEvalKit 103b283 (`infer/custom_models/load_model.py`, `infer/infer_mp_gpu.py`).
"""

import abc
import importlib
import importlib.util
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from spar.common.errors import InputError
from spar.evaluation.bridges import genediteval, vlmevalkit
from spar.inference.image_files import read_metadata
from spar.inference.loading import load_pipeline

BRIDGES = Path(genediteval.__file__).parent
GUIDE = (Path(__file__).parents[2] / "docs" / "bridges.md").read_text(encoding="utf-8")
RED, BLUE = (Image.new("RGB", (64, 64), color) for color in ("red", "blue"))


@pytest.fixture(scope="module")
def folder(tiny_run) -> str:
    return str(tiny_run.path / "model")


@pytest.fixture(scope="module")
def pipe(folder):
    return load_pipeline(folder, progress=False)


class Recorder:
    """A pipeline that answers with its last question, word by word, and keeps its calls."""

    def __init__(self):
        self.calls, self.pieces = [], 0

    def chat(self, messages, **settings):
        self.calls.append((messages, settings))
        for word in messages[-1]["content"][-1]["text"].split():
            self.pieces += 1
            yield word + " "


# lmms-eval


class Lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size, self.task_dict, self.cleaned = 0, 1, {}, False

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    @classmethod
    def create_from_arg_string(cls, arg_string, additional_config=None):
        given = dict(pair.split("=", 1) for pair in arg_string.split(","))
        given = {key: int(value) if value.isnumeric() else value for key, value in given.items()}
        return cls(**given, **{key: value for key, value in (additional_config or {}).items() if value is not None})

    @property
    def rank(self):
        return self._rank

    def clean(self):
        self.cleaned = True


@dataclass
class Instance:
    arguments: tuple
    metadata: dict = field(default_factory=dict)

    @property
    def args(self):
        return self.arguments


class ChatMessages:
    def __init__(self, messages):
        self.messages = messages
        for message in messages:
            assert message["role"] in ("user", "system", "assistant") and isinstance(message["content"], list)

    def to_hf_messages(self):
        names = {"text": "text", "image": "url", "video": "url"}
        return [
            {
                "role": message["role"],
                "content": [{"type": (kind := part["type"]), kind: part[names[kind]]} for part in message["content"]],
            }
            for message in self.messages
        ]


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


def load_lmms_bridge(monkeypatch, modules: dict[str, object]) -> ModuleType:
    """The bridge, executed anew beside modules of lmms-eval; all are forgotten after the test."""
    for name, names in modules.items():
        module = names
        if isinstance(names, dict):
            module = ModuleType(name)
            vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    name = "spar.evaluation.bridges.lmms_eval"
    spec = importlib.util.spec_from_file_location(name, BRIDGES / "lmms_eval.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def lmms(monkeypatch) -> ModuleType:
    kit = {
        "lmms_eval": {"__path__": []}, "lmms_eval.api": {"__path__": []}, "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {"__path__": []}, "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
    }  # fmt: skip
    return load_lmms_bridge(monkeypatch, kit)


def user(*parts) -> list[dict]:
    """A task's messages: texts, and images as `url`."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "url": part} for part in parts
    ]
    return [{"role": "user", "content": content}]


def requests_of(model, docs, options=None, doc_to_messages=lambda doc: doc) -> list[Instance]:
    """Requests as `ConfigurableMessagesTask.construct_requests` makes them."""
    model.task_dict["task"] = {"test": docs}
    return [
        Instance(("context", doc_to_messages, dict(options or {}), number, "task", "test"), {"doc_id": number})
        for number in range(len(docs))
    ]


@pytest.mark.skipif(importlib.util.find_spec("lmms_eval") is not None, reason="lmms-eval is installed")
def test_without_lmms_eval_the_bridge_is_imported_and_says_what_is_missing(monkeypatch):
    bridge = load_lmms_bridge(monkeypatch, {})
    for call in (bridge.manifest, bridge.SparChatModel):
        with pytest.raises(InputError, match="pip install lmms-eval"):
            call()


def test_a_missing_dependency_of_lmms_eval_is_not_taken_for_a_missing_lmms_eval(monkeypatch):
    kit = {"lmms_eval": {"__path__": []}, "lmms_eval.api": {"__path__": []}, "lmms_eval.api.model": None}
    with pytest.raises(ModuleNotFoundError, match="lmms_eval.api.model"):
        load_lmms_bridge(monkeypatch, kit)


def test_the_registry_of_lmms_eval_takes_the_manifest(lmms):
    manifest = lmms.manifest()
    assert (manifest.model_id, manifest.simple_class_path) == ("spar", None)
    module, _, name = manifest.chat_class_path.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    assert issubclass(found, Lmms) and found.is_simple is False and not found.__abstractmethods__


def test_answers_are_the_pipelines_own_in_the_order_of_the_requests(lmms, folder, pipe):
    config = {"batch_size": 1, "max_batch_size": None, "device": None}
    model = lmms.SparChatModel.create_from_arg_string(f"model={folder},max_tiles=1", config)
    question = "what color is the background?"
    docs = [user(RED, question), user(BLUE, "how many objects are there?"), user(RED, BLUE, question)]
    requests = requests_of(model, docs, {"max_new_tokens": 5, "temperature": 0.0, "until": ["\n\n"]})
    answers = model.generate_until([requests[2], requests[0], requests[1]])

    def ask(text, *images):
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        return "".join(pipe.chat([{"role": "user", "content": content}], max_new_tokens=5))

    expected = [ask(question, RED, BLUE), ask(question, RED), ask("how many objects are there?", BLUE)]
    assert answers == expected and len({*answers}) > 1
    assert model.device == pipe.device
    model.clean()
    assert model.pipeline is None and model.cleaned


def test_options_of_a_request_reach_the_pipeline(lmms, folder):
    model = lmms.SparChatModel(folder, seed=5, max_tiles=2)
    model.pipeline = Recorder()
    (request,) = requests_of(model, [user(RED, "one two three")], {"temperature": 0.7, "top_p": 0.9})
    drawn = {"max_new_tokens": None, "temperature": 0.7, "top_p": 0.9, "max_tiles": 2}
    assert model.generate_until([request] * 2) == ["one two three "] * 2
    assert [settings for _, settings in model.pipeline.calls] == [{**drawn, "seed": 5}, {**drawn, "seed": 6}]

    # mmsearch has top_p 0 beside temperature 0, which have no meaning together
    greedy = requests_of(model, [user("one")], {"temperature": 0, "top_p": 0, "max_new_tokens": 512, "until": None})
    model.generate_until(greedy)
    assert model.pipeline.calls[-1][1] == {"max_new_tokens": 512, "temperature": 0.0, "max_tiles": 2}


@pytest.mark.parametrize(
    ("until", "answer", "pieces"),
    [
        (["three", "two"], "one ", 2),
        ("e t", "on", 2),  # across pieces
        ([""], "one two three four ", 4),
        (["five"], "one two three four ", 4),
    ],
)
def test_an_answer_ends_before_the_first_stop_string(lmms, folder, until, answer, pieces):
    model = lmms.SparChatModel(folder)
    model.pipeline = Recorder()
    assert model.generate_until(requests_of(model, [user("one two three four")], {"until": until})) == [answer]
    assert model.pipeline.pieces == pieces  # the others are not decoded


def test_the_rounds_of_a_task_end_when_it_says_so(lmms, folder):
    model = lmms.SparChatModel(folder)
    model.pipeline = Recorder()
    seen = []

    def rounds(doc, *, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return user(doc)
        seen.append((round_idx, previous_output, previous_round_info))
        if round_idx == 3:
            return None, True, previous_output, None
        return user(f"{doc} {round_idx}"), False, previous_output, {"round": round_idx}

    requests = requests_of(model, ["first", "second"], doc_to_messages=rounds)
    expected = [[f"{doc} ", f"{doc} 1 ", f"{doc} 2 "] for doc in ("first", "second")]
    assert model.generate_until_multi_round(requests) == expected
    assert seen[:3] == [
        (1, ["first "], None),
        (2, ["first ", "first 1 "], {"round": 1}),
        (3, ["first ", "first 1 ", "first 2 "], {"round": 2}),
    ]
    one = requests_of(model, ["only"], doc_to_messages=lambda doc, round_idx=None, **_: user(doc))
    assert model.generate_until_multi_round(one) == [["only "]]


def test_a_task_of_images_gets_their_absolute_paths(lmms, folder, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = lmms.SparChatModel(folder, mode="generate", output="drawn", seed=3, num_inference_steps=2)
    first, second = requests_of(model, [user("a red circle"), user(RED, "change the background to navy")])
    filling = Instance(first.arguments, {**first.metadata, "__padding_only__": True})
    results = [json.loads(text) for text in model.generate_until([first, first, second, filling])]
    names = ["0.png", "0-1.png", "1.png", "0.png"]
    assert [found["images"] for found in results] == [[str(tmp_path / "drawn" / "task" / name)] for name in names]
    assert {found["text"] for found in results} == {""}

    made = [pipe.generate("a red circle", seed=seed, num_inference_steps=2) for seed in (3, 4)]
    made.append(pipe.edit(RED, "change the background to navy", seed=3, num_inference_steps=2))
    for found, out in zip(results, made, strict=False):
        assert Image.open(found["images"][0]).tobytes() == out.images[0].tobytes()
    assert read_metadata(Path(results[1]["images"][0])).values["seed"] == 4


@pytest.mark.parametrize(
    ("mode", "messages", "expected"),
    [
        ("edit", user("a red circle"), "expected one reference image for each edit, got 0"),
        ("generate", user(RED, BLUE, "change the background to navy"), "expected one reference image.*got 2"),
        ("generate", [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}], "got video"),
        ("generate", [*user("a red circle"), *user("a blue star")], "expected one of the user.*got 2"),
        ("understand", [{"role": "user", "content": [{"type": "video", "url": "x.mp4"}]}], "got type 'video'"),
    ],
)
def test_requests_that_spar_cannot_serve_are_refused(lmms, folder, tmp_path, mode, messages, expected):
    output = None if mode == "understand" else str(tmp_path)
    model = lmms.SparChatModel(folder, mode=mode, output=output)
    with pytest.raises(InputError, match=expected):
        model.generate_until(requests_of(model, [messages]))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": "draw"}, "mode: expected one of understand, generate, edit, got draw"),
        ({"mode": "generate"}, "output: expected a folder"),
        ({"output": "x"}, "output: expected none with mode=understand"),
        ({"guidance_scale": 2}, "guidance_scale: expected none with mode=understand"),
        ({"mode": "edit", "output": "x", "max_tiles": 2}, "max_tiles: expected none with mode=edit"),
        ({"batch_size": "8"}, "batch_size: expected 1, .*got 8"),
    ],
)
def test_settings_without_effect_are_refused(lmms, settings, expected):
    with pytest.raises(InputError, match=expected):
        lmms.SparChatModel("nowhere", **settings)


def test_tasks_of_likelihoods_are_refused(lmms, folder, tmp_path):
    with pytest.raises(InputError, match="no likelihood"):
        lmms.SparChatModel(folder).loglikelihood([])
    with pytest.raises(InputError, match="expected understand"):
        lmms.SparChatModel(folder, mode="generate", output=str(tmp_path)).generate_until_multi_round([])


def test_each_of_several_processes_takes_its_own_device(lmms, folder, monkeypatch):
    class Accelerator:
        def __init__(self, cpu=False):
            self.device = "cpu" if cpu else "cuda:1"

    monkeypatch.setattr("accelerate.Accelerator", Accelerator)
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = lmms.SparChatModel(folder, device="cpu")
    assert str(model.device) == "cpu" and isinstance(model.accelerator, Accelerator)
    with pytest.raises(InputError, match="cuda:1"):  # that of this process; there is none
        lmms.SparChatModel(folder, device="cuda")
    with pytest.raises(InputError, match="each process has its own, got cuda:0"):
        lmms.SparChatModel(folder, device="cuda:0")


# VLMEvalKit

BASE = '''
class BaseModel:
    INTERLEAVE = False
    allowed_types = ["text", "image", "video"]

    def __init__(self):
        self.dump_image_func = None

    def use_custom_prompt(self, dataset):
        return False

    def set_dump_image(self, dump_image_func):
        self.dump_image_func = dump_image_func

    def generate(self, message, dataset=None):
        for item in message:
            assert item["type"] in self.allowed_types
        return self.generate_inner(message, dataset)

    def chat(self, messages, dataset=None):
        assert hasattr(self, "chat_inner")
        return self.chat_inner(messages, dataset=dataset)
'''
RUN = '''
import argparse
from vlmeval.config import supported_VLM
from vlmeval.smp import load_env

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--work-dir", default="./outputs")
    global DONE
    DONE = parser.parse_args()
    DONE.built = [supported_VLM[name] for name in DONE.model]
'''


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A checkout of VLMEvalKit as far as the launcher sees it; what it imports is forgotten after the test."""
    files = {
        "run.py": RUN, "vlmeval/__init__.py": "", "vlmeval/smp.py": "LOADED = []\ndef load_env(): LOADED.append(1)",
        "vlmeval/config.py": "supported_VLM = {}", "vlmeval/vlm/__init__.py": "from .base import BaseModel",
        "vlmeval/vlm/base.py": BASE,
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "kit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "kit")
    monkeypatch.setattr(sys, "argv", ["launcher"])
    before = {*sys.modules}
    yield tmp_path / "kit"
    for name in {*sys.modules} - before:
        if name.split(".")[0] in ("vlmeval", vlmevalkit.RUNNER):
            del sys.modules[name]


def test_the_launcher_registers_the_model_and_runs_the_kit_on_it(checkout, folder, pipe, tmp_path):
    vlmevalkit.main(["--spar-model", folder, "--spar-max-new-tokens", "4", "--data", "MME", "MMVP", "--work-dir", "w"])
    done = sys.modules[vlmevalkit.RUNNER].DONE
    assert (done.data, done.model, done.work_dir) == (["MME", "MMVP"], ["SPAR"], "w")
    assert sys.argv[0] == str(checkout / "run.py") and importlib.import_module("vlmeval.smp").LOADED == [1]

    kit = importlib.import_module("vlmeval.vlm")
    (built,) = done.built
    model = built()
    assert type(model) is kit.Spar and isinstance(model, kit.BaseModel) and model.INTERLEAVE is True
    model.set_dump_image(print)
    assert model.dump_image_func is print

    RED.save(tmp_path / "red.png")
    image = {"type": "image", "value": str(tmp_path / "red.png")}
    question = {"type": "text", "value": "how many objects are there?"}
    own = [{"type": "image", "image": RED}, {"type": "text", "text": question["value"]}]
    turns = [{"role": "user", "content": own}]
    first = "".join(pipe.chat(turns, max_new_tokens=4))
    assert model.generate([image, question], dataset="MME") == first
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "what color is the background?"}]
    talk = [
        {"role": "user", "content": [image, question]},
        {"role": "assistant", "content": [{"type": "text", "value": first}]},
        {"role": "user", "content": [{"type": "text", "value": "what color is the background?"}]},
    ]
    assert model.chat(talk) == "".join(pipe.chat(turns, max_new_tokens=4))
    with pytest.raises(InputError, match="got type 'video'"):
        model.generate([{"type": "video", "value": "x.mp4"}])


def test_the_kits_own_choice_of_models_is_kept(checkout, folder):
    vlmevalkit.main(["--spar-name", "SPAR-1B", "--model", "SPAR-1B", "--data", "MME"])
    assert sys.modules[vlmevalkit.RUNNER].DONE.model == ["SPAR-1B"]
    assert importlib.import_module("vlmeval.config").supported_VLM["SPAR-1B"].keywords["model"] == "spar"


def test_a_kit_without_its_script_is_refused(checkout):
    (checkout / "run.py").unlink()
    with pytest.raises(InputError, match=r"expected run\.py beside its package"):
        vlmevalkit.main(["--data", "MME"])


def test_a_missing_kit_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="got no package vlmeval"):
        vlmevalkit.main(["--data", "MME"])


# GenEditEvalKit


def entries() -> dict:
    """The entries of `MODEL_SETTINGS` that the guide shows."""
    block = re.search(r"```python\n(\"spar\": \{.*?\})\n```", GUIDE, re.S)[1]
    return json.loads(re.sub(r",(\s*[}\]])", r"\1", f"{{{block}}}"))


def test_the_kits_loader_finds_the_model_by_the_entry_of_the_guide(folder, pipe):
    setting = entries()["spar"]
    found = getattr(importlib.import_module(setting["module"], package="custom_models"), setting["class"])
    model = found(model_path=folder, **setting["model_kwargs"], num_inference_steps=2)
    assert model.model_name == "model" and (model.width, model.height) == (64, 64)

    image = model.generate("a red circle", seed=42 + 1)  # as infer_mp_gpu.py calls it, for both kinds of benchmarks
    assert image.tobytes() == pipe.generate("a red circle", seed=43, num_inference_steps=2).images[0].tobytes()
    inputs = [RED, "change the background to navy"]
    edited = pipe.edit(RED, "change the background to navy", seed=42, num_inference_steps=2).images[0]
    for given in ({"prompt": inputs}, {"input_list": inputs}, {"input_list": inputs[::-1]}):
        assert model.generate(**given, seed=42).tobytes() == edited.tobytes()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "got neither"),
        ({"prompt": "a red circle", "input_list": [RED, "x"]}, "got both"),
        ({"input_list": ["a red circle"]}, "expected one reference image for each edit, got 0"),
        ({"input_list": [RED, BLUE, "x"]}, "expected one reference image for each edit, got 2"),
    ],
)
def test_inputs_of_no_kind_are_refused(folder, given, expected):
    with pytest.raises(InputError, match=expected):
        genediteval.SparGenEdit(folder).generate(**given)


# The guide


def test_the_flags_and_arguments_of_the_guide_exist(lmms):
    source = (BRIDGES / "vlmevalkit.py").read_text(encoding="utf-8")
    flags = {*re.findall(r"--spar-[\w-]+", GUIDE)}
    assert flags and flags <= {*re.findall(r'"(--spar-[\w-]+)"', source)}
    known = {*lmms.SparChatModel.__init__.__annotations__}
    arguments = {pair.split("=")[0] for given in re.findall(r"--model_args (\S+)", GUIDE) for pair in given.split(",")}
    assert {"model", "mode", "output"} <= arguments <= known
