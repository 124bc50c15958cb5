"""A run that is shared is one that others can load, says what it is, and names no place of its author's machine."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from small_runs import one_line, spd_here

import spdcli
from spdcli.recipe.reading import load_recipe
from spdcli.runs import sharing

SMALL = {
    "target.length": 6,
    "target.d_model": 4,
    "target.vocabulary": 8,
    "train.steps": 2,
    "train.batch": 2,
    "decompose.steps": 2,
    "decompose.batch": 2,
    "slices.C": 3,
    "importance.kind": "vector",
    "importance.relative": "query",
    "importance.relative_start": "zero",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return spdcli.decompose("induction-quick", out=tmp_path_factory.mktemp("own") / "run", **SMALL)


def test_what_was_shared_is_the_same_run(run, tmp_path, monkeypatch, capsys):
    spd = spd_here(monkeypatch, capsys)
    assert spd("eval", run.directory.path, "--sequences", "8", "--quiet")[0] == 0
    code, out, _ = spd("push", run.directory.path, "--out", tmp_path / "shared", "--json")
    assert code == 0
    assert json.loads(out) == {
        "schema": "spd.push/1",
        "run": str(run.directory.path),
        "place": str(tmp_path / "shared"),
    }
    read = spdcli.from_pretrained(tmp_path / "shared")
    for matrix in run.matrices:
        assert all(map(torch.equal, read.slices(matrix), run.slices(matrix)))
    text = "1 s 2 3 4 s"
    assert torch.equal(read.importances(text)["Q0"], run.importances(text)["Q0"])
    card = ModelCard.load(tmp_path / "shared" / "README.md")
    assert card.data.library_name == "spd"
    assert "| recon | importance" in card.text
    for path in (tmp_path / "shared").rglob("*"):
        if path.is_file():
            assert str(run.directory.path.parent).encode() not in path.read_bytes(), path


def test_a_folder_is_replaced_by_force_alone(run, tmp_path, monkeypatch, capsys):
    spd = spd_here(monkeypatch, capsys)
    (tmp_path / "mine").write_text("text")
    code, _, err = spd("push", run.directory.path, "--out", tmp_path / "mine")
    assert code == 2
    one_line(err, "mine is there already", "--force replaces it")
    assert (tmp_path / "mine").read_text() == "text"
    code, _, err = spd("push", run.directory.path)
    assert code == 2
    one_line(err, "expected one of --repo OWNER/NAME and --out DIRECTORY")


@pytest.mark.parametrize(
    ("model", "base"),
    [
        ("openai-community/gpt2", "openai-community/gpt2"),
        ("./gpt2", None),
        ("/data/x.gguf", None),
        ("package:a/b", None),
    ],
)
def test_the_base_model_is_a_hub_id_or_nothing(model, base):
    assert sharing.base_model(load_recipe("gpt2", [f"target.model={model}"]).recipe) == base
    assert sharing.base_model(load_recipe("induction").recipe) is None


class Hub:
    """Takes what is uploaded into a folder."""

    def __init__(self, uploads):
        self.uploads = uploads

    def create_repo(self, repository, private, exist_ok):
        assert exist_ok
        return f"https://hub/{repository}{' private' if private else ''}"

    def upload_folder(self, repo_id, folder_path, commit_message):
        self.uploads[repo_id] = sorted(str(path.relative_to(folder_path)) for path in folder_path.rglob("*.*"))


def test_an_upload_holds_what_a_reader_needs(run, monkeypatch):
    uploads: dict = {}
    monkeypatch.setattr(sharing, "HfApi", lambda: Hub(uploads))
    assert run.push_to_hub("me/toy", private=True) == "https://hub/me/toy private"
    names = [name for name in uploads["me/toy"] if not name.startswith(".")]
    assert set(names) <= set(sharing.FILES)
    assert {"recipe.toml", "decomposition.safetensors", "README.md", "toy/target.safetensors"} <= set(names)


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def refuse(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(sharing, "snapshot_download", refuse)
    with pytest.raises(spdcli.SpdError, match="the hub cannot be reached for 'me/toy': no network"):
        spdcli.from_pretrained("me/toy")
