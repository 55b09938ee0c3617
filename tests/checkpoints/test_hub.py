"""What is sent to the Hub: huggingface_hub's own client against a small Hub of our own, over real connections."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spar.checkpoints.hub import ALLOWED_FILES, hub_address, model_folder, plan_upload, push
from spar.checkpoints.spar_format import load_model, save_tokenizer
from spar.cli.main import main
from spar.common.errors import InputError
from spar.inference.diffusers_autoencoder import AutoencoderSpar
from spar.inference.image_files import read_metadata
from spar.inference.pipeline import SparPipeline

TOKEN = "hf_of_the_test"
COMMIT = "0" * 40


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


class Hub(BaseHTTPRequestHandler):
    """The few endpoints that an upload needs: weights go the LFS way, everything else in the commit itself."""

    repositories: dict[str, Repository]
    objects: dict[str, bytes]

    def answer(self, status: int, value: object = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass

    def _known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.answer(401, {"error": "Invalid username or password."})
        return False

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() == oid:
            self.objects[oid] = data
        self.answer(200, {})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if not self._known():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            new = name not in self.repositories
            if new:
                self.repositories[name] = Repository(asked.get("visibility") == "private")
            self.answer(200 if new else 409, {"url": f"{self.here}/{name}", "error": "exists"})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"warnings": [], "errors": []})
        elif found := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/preupload/main", self.path):
            files = [
                {"path": one["path"], "uploadMode": "lfs" if one["path"].endswith("safetensors") else "regular",
                 "shouldIgnore": False, "oid": None}
                for one in json.loads(data)["files"]
            ]  # fmt: skip
            self.answer(200, {"files": files})
        elif self.path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.here}/lfs/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/models/([\w-]+/[\w-]+)/commit/main", self.path):
            repository = self.repositories[found[1]]
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "header":
                    repository.commits.append(value["summary"])
                elif line["key"] == "file":
                    repository.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    repository.files[value["path"]] = self.objects[value["oid"]]
                elif line["key"] == "deletedFile":
                    del repository.files[value["path"]]
            address = f"{self.here}/{found[1]}/commit/{len(repository.commits)}"
            self.answer(200, {"commitUrl": address, "commitOid": "0" * 40, "hookOutput": ""})
        else:
            self.answer(404, {"error": f"no {self.path}"})

    def do_GET(self) -> None:
        if not self._known():
            return
        path = self.path.partition("?")[0]
        found = re.match(r"(?:/api/models)?/([\w-]+/[\w-]+)(?:/(.*))?", path)
        repository = self.repositories.get(found[1]) if found else None
        rest = found[2] if found else None
        if repository is None:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif path.startswith("/api/") and (not rest or rest.startswith("revision/")):
            files = [{"rfilename": name} for name in repository.files]
            self.answer(200, {"id": found[1], "private": repository.private, "sha": COMMIT, "siblings": files})
        elif rest.startswith("tree/"):
            files = repository.files.items()
            self.answer(200, [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in files])
        else:
            data = repository.files[rest.split("/", 2)[2]]
            self.answer(200, data, ETag=hashlib.sha1(data).hexdigest(), X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    @property
    def here(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"repositories": {}, "objects": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    handler.address = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield handler
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def here(hub, monkeypatch, tmp_path) -> type[Hub]:
    """This process's own client, with what it read from its surroundings replaced."""
    from huggingface_hub import constants

    changes = {
        "ENDPOINT": hub.address,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.address + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hf"),
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
    }
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def folder(tiny_run, tmp_path) -> Path:
    return shutil.copytree(tiny_run.path / "model", tmp_path / "model")


@pytest.mark.slow
def test_a_folder_arrives_from_the_command_line(hub, folder, tmp_path):
    """In a process of its own: the client reads where the Hub is when it is imported."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING_FACE_"))}
    env |= {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "spar", "push", str(folder), "me/model", "--message", "first"]
    (folder / ".env").write_text("SECRET=1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    repository = hub.repositories["me/model"]
    assert repository.private and repository.commits == ["first"]
    assert repository.files == {name: data for name, data in contents(folder).items() if name != ".env"}
    assert done.stdout.splitlines()[-1] == f"{hub.address}/me/model/commit/1"
    assert "not uploaded, since spar reads no such files: .env" in done.stderr


def test_a_folder_sent_again_replaces_its_own_files_alone(here, folder):
    push(plan_upload(folder), "me/model")
    repository = here.repositories["me/model"]
    beside = {".gitattributes": b"x", "LICENSE": b"mine", "README.md": b"by hand"}
    repository.files |= {**beside, "denoiser/model-00001-of-00002.safetensors": b"of an older, larger model"}
    (folder / "manifest.json").write_text("{}")
    (folder / "README.md").unlink()  # it stays there, though none is sent
    push(plan_upload(folder), "me/model")
    assert repository.files == {**contents(folder), **beside} and len(repository.commits) == 2


@pytest.mark.parametrize("address", ["hf://me/model", "hf:/me/model", "hf://me/model@main", Path("hf://me/model")])
def test_a_folder_comes_back_as_it_was_sent(here, folder, address, monkeypatch):
    push(plan_upload(folder), "me/model")
    here.repositories["me/model"].files["malware.py"] = b"import os"
    assert contents(model_folder(address)) == contents(folder)


@pytest.mark.parametrize("address", ["hf://me/model", Path("hf://me/model@main")])
def test_an_image_names_the_commit_that_drew_it(here, folder, address, tmp_path):
    """Not the address alone, whose weights may be other ones tomorrow, and no place on this disk."""
    push(plan_upload(folder), "me/model")
    pipe = SparPipeline.from_pretrained(address, device="cpu")
    (path,) = pipe.generate("a red circle", num_inference_steps=1, seed=0).save(tmp_path / "out.png")
    image = read_metadata(path)
    assert image.values["model"] == f"hf://me/model@{model_folder(address).name}"
    assert image.reproduce_command()[-1] == f"--model={image.values['model']}"
    again = SparPipeline.from_pretrained(image.values["model"], device="cpu")
    assert again.origin == pipe.origin


def test_a_repository_is_named_as_in_diffusers_where_there_is_no_such_folder(here, folder, tmp_path, monkeypatch):
    push(plan_upload(folder), "me/model")
    monkeypatch.chdir(tmp_path)
    assert str(SparPipeline.from_pretrained("me/model", device="cpu").origin["model"]).startswith("hf://me/model@")
    sizes = AutoencoderSpar.from_pretrained(folder).config["sizes"]
    assert all(AutoencoderSpar.from_pretrained(f"{at}me/model").config["sizes"] == sizes for at in ("", "hf://"))
    with pytest.raises(InputError, match="me/none cannot be had from the Hub"):
        SparPipeline.from_pretrained("me/none", device="cpu")
    for name in ("/model", "model/", "./model", "../m", "~/m", "me/.model", "a/b/c", "me:x/m", Path("me/model")):
        assert hub_address(name) == name
    assert hub_address("me/model@v1") == "hf://me/model@v1"
    (tmp_path / "me" / "model").mkdir(parents=True)  # a folder comes first, even an empty one
    with pytest.raises(InputError, match="config.json"):
        SparPipeline.from_pretrained("me/model", device="cpu")


def test_an_address_is_the_hubs_also_where_a_folder_has_that_name(here, folder, tmp_path, monkeypatch):
    push(plan_upload(folder), "me/model")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "model").mkdir(parents=True)
    assert contents(model_folder("hf://me/model@main")) == contents(folder)
    (tmp_path / "me" / "other").write_text("a file")
    with pytest.raises(InputError, match="model: me/other cannot be had from the Hub"):
        model_folder("hf://me/other")


def test_what_is_no_address_or_cannot_be_had_gets_a_message(here):
    for address in ("hf://model", "hf://a/b/c", "hf:me/model"):
        with pytest.raises(InputError, match="model: expected a folder or hf://OWNER/NAME"):
            model_folder(address)
    with pytest.raises(InputError, match="model: me/none cannot be had from the Hub or its cache"):
        model_folder("hf://me/none")
    assert model_folder("me/none") == Path("me/none")  # a folder that is not there is none of the Hub's


def test_what_the_hub_refuses_gets_a_message(here, folder, monkeypatch):
    from huggingface_hub import constants

    goods = plan_upload(folder)
    for token in ("", "wrong"):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(InputError, match="the Hub does not take me/model: .*; hf auth login, or HF_TOKEN"):
            push(goods, "me/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert here.repositories == {}
    for name in ("model", "a/b/c", "", "me/mo del"):
        with pytest.raises(InputError, match="REPO_ID: expected OWNER/NAME"):
            push(goods, name)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(InputError, match="the Hub does not take me/model: "):
        push(goods, "me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="the Hub"):
        push(goods, "me/model")


def test_weights_are_never_made_public_by_accident(here, folder):
    here.repositories["me/model"] = Repository(private=False)
    with pytest.raises(InputError, match="me/model is public already; --public says that this is meant"):
        push(plan_upload(folder), "me/model")
    assert here.repositories["me/model"].files == {}
    push(plan_upload(folder), "me/model", private=False)
    assert here.repositories["me/model"].files == contents(folder)


def test_another_model_is_not_written_over(here, folder):
    files = {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"theirs"}
    here.repositories["me/model"] = Repository(private=True, files=dict(files))
    with pytest.raises(InputError, match="holds another model .its config.json says format None"):
        push(plan_upload(folder), "me/model")
    assert here.repositories["me/model"].files == files


def test_a_dry_run_says_what_would_go_and_asks_nobody(here, folder, capsys):
    assert main(["push", str(folder), "me/model", "--dry-run"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert here.repositories == {}
    sizes = {line.split()[1]: int(line.split()[0].replace(",", "")) for line in lines}
    assert sizes == {name: len(data) for name, data in contents(folder).items()}
    assert last.endswith(f"{sum(sizes.values()):,}  bytes in {len(sizes)} files would go to me/model, private")


def test_what_belongs_to_a_folder_is_what_saving_writes(folder, tmp_path):
    goods = plan_upload(folder)
    assert goods.files == {name: len(data) for name, data in contents(folder).items()} and goods.ignored == []
    save_tokenizer(load_model(folder).model.tokenizer, tmp_path / "alone")
    assert set(plan_upload(tmp_path / "alone").files) == {"config.json", "model.safetensors"}
    assert not any(pattern.startswith("*") for pattern in ALLOWED_FILES)  # other models' files are no business of ours


def test_a_damaged_folder_or_a_link_is_not_sent(folder, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match="expected plain files, but README.md is a link"):
        plan_upload(folder)
    (folder / "README.md").unlink()
    (folder / "router" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="model.safetensors is missing"):
        plan_upload(folder)
