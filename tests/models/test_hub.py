"""MODEL as a hub id: downloaded from a hub, found in the cache, or refused in one line."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest

from tiny import bytes_of, files_below, save_tiny, tensors_of

COMMIT = hashlib.sha1(b"the only one").hexdigest()
REFUSALS = {  # model: what the hub answers when asked about it
    "me/missing": (404, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}),
    "me/private": (401, {"X-Error-Message": "Invalid username or password."}),
    "me/expired": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "me/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model me/gated is restricted"}),
    "me/broken": (503, {"X-Error-Message": "Service Unavailable"}),
}
GATED = "me/gated-files"  # anyone may see that it is there and what is in it
NOT_HERE = 404, {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as a download needs; `repositories` are {model: {file: bytes}}."""

    protocol_version = "HTTP/1.1"

    def __init__(self, repositories, asked, *args):
        self.repositories, self.asked = repositories, asked
        super().__init__(*args)

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        path = urlsplit(self.path).path.strip("/")
        self.asked.append(path)
        words = path.removeprefix("api/models/").split("/")
        model, rest = "/".join(words[:2]), words[2:]
        files = self.repositories.get(model)
        if files is None:
            status, headers = REFUSALS.get(model, NOT_HERE)
            self.answer(status, json.dumps({"error": headers["X-Error-Message"]}).encode(), **headers)
        elif rest[0] == "revision":
            listed = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": model, "sha": COMMIT, "siblings": listed}).encode())
        elif rest[0] == "tree":
            listed = [{"type": "file", "path": n, "size": len(b), "oid": etag_of(b)} for n, b in files.items()]
            self.answer(200, json.dumps(listed).encode())
        elif model == GATED:
            self.answer(401, **{"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif model == "me/half" and rest[-1] == "model.safetensors":
            self.answer(NOT_HERE[0], **NOT_HERE[1])
        else:
            body = files["/".join(rest[2:])]
            self.answer(200, body, ETag=f'"{etag_of(body)}"')

    do_HEAD = do_GET


def etag_of(body):
    return hashlib.sha1(body).hexdigest()


SCRIPT = """
import contextlib, io, json, sys
from secateur.cli import main
for model in sys.argv[1:]:
    words = ["prune", model, model.replace("/", "-"), "--method", "magnitude"]
    with contextlib.redirect_stderr(io.StringIO()) as said, contextlib.redirect_stdout(io.StringIO()):
        code = main(["--quiet", *words] if model == "me/quiet" else words)
    print(json.dumps([code, said.getvalue()]))
"""


def run(folder, endpoint, *models):
    """Prune models by id in one process of their own, with one cache; give back what came of each."""
    done = call(folder, endpoint, sys.executable, "-c", SCRIPT, *models)
    found = [SimpleNamespace(code=code, said=said) for code, said in map(json.loads, done.stdout.splitlines())]
    assert len(found) == len(models), done.stderr
    return dict(zip(models, found, strict=True))


def call(folder, endpoint, *command):
    places = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    foreign = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    proxies = ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    known = {name: value for name, value in os.environ.items() if name not in (*foreign, *proxies)}
    return subprocess.run(command, env=known | places, cwd=folder, text=True, capture_output=True, timeout=300)


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tokenizer):
    """What came of every model while the hub was there, and afterwards."""
    folder = tmp_path_factory.mktemp("hub")
    model = save_tiny(folder / "model", "llama", tokenizer=tokenizer)
    files = files_below(model)
    extra = {
        "README.md": b"---\nlicense: cc-by-4.0\n---\n# Tiny",
        "pytorch_model.bin": b"\x80\x04.",
        "onnx/model.onnx": b"no",
    }
    pickled = {name: content for name, content in files.items() if not name.endswith(".safetensors")}
    repositories = {
        "me/tiny": files | extra,
        "me/later": files,
        "me/quiet": files,
        "me/half": files,
        "me/pickled": pickled | {"pytorch_model.bin": b"\x80\x04."},
        GATED: files,
    }
    asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, repositories, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        told = run(folder, endpoint, "me/tiny", "me/pickled", "me/half", GATED, *REFUSALS, "me/quiet")
    finally:
        server.shutdown()
        server.server_close()
    script = Path(sys.executable).with_name("secateur")
    again = call(folder, endpoint, str(script), "prune", "me/tiny", "again", "--method", "magnitude")
    later = run(folder, endpoint, "me/later", "me/half")
    told |= {"me/later": later["me/later"], "me/half later": later["me/half"]}
    return SimpleNamespace(folder=folder, model=model, told=told, again=again, asked=asked)


def test_a_model_is_pruned_by_its_id(hub):
    assert hub.told["me/tiny"].code == 0
    before, after = tensors_of(hub.model), tensors_of(hub.folder / "me-tiny")
    assert before.keys() == after.keys()
    name = "model.layers.1.mlp.up_proj.weight"
    assert int((after[name] == 0).sum()) * 2 == after[name].numel()
    assert bytes_of(after["lm_head.weight"]) == bytes_of(before["lm_head.weight"])
    assert (hub.folder / "me-tiny" / "tokenizer.json").exists()
    report = json.loads((hub.folder / "me-tiny" / "secateur.json").read_text())
    assert report["plan"]["model"]["name"] == "me/tiny"
    card = (hub.folder / "me-tiny" / "README.md").read_text()
    assert "license: cc-by-4.0" in card and "base_model: me/tiny" in card


def test_only_what_is_needed_is_downloaded(hub):
    loaded = {path.rsplit("/", 1)[1] for path in hub.asked if path.startswith("me/tiny/resolve")}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= loaded
    assert not loaded & {"pytorch_model.bin", "model.onnx"}
    assert not any(path.endswith("pytorch_model.bin") for path in hub.asked)


def test_quiet_downloads_in_silence(hub):
    assert hub.told["me/quiet"].code == 0 and hub.told["me/quiet"].said == ""


def test_without_the_hub_the_cache_is_enough(hub):
    assert hub.again.returncode == 0, hub.again.stderr
    first, second = (tensors_of(hub.folder / name) for name in ("me-tiny", "again"))
    assert first.keys() == second.keys()
    assert all(bytes_of(first[name]) == bytes_of(second[name]) for name in first)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("me/missing", "no such public model on the hub"),
        ("me/private", "log in"),
        ("me/expired", "log in"),
        ("me/gated", "accept its terms"),
        (GATED, "accept its terms"),
        ("me/broken", "503.*give a local directory"),
        ("me/later", "cannot be reached.*give a local directory"),
        ("me/pickled", "no safetensors weights.*save_pretrained"),
        ("me/half later", "is incomplete"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(hub, model, said):
    told, model = hub.told[model], model.split()[0]
    errors = [line for line in told.said.splitlines() if line.startswith("error: ")]
    assert told.code == 1 and len(errors) == 1 and "Traceback" not in told.said
    assert model in errors[0] and re.search(said, errors[0]), errors[0]
    left = [path.name for path in hub.folder.iterdir() if path.name.startswith(model.replace("/", "-") + ".")]
    assert not left and not (hub.folder / model.replace("/", "-")).exists()


@pytest.mark.parametrize("model", ["me/private", "me/expired"])
def test_a_hub_that_refuses_was_reached(hub, model):
    assert "cannot be reached" not in hub.told[model].said
