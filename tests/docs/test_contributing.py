"""CONTRIBUTING.md: its examples are put into a copy of the sources, and work there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from printed import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
TRY = "try it"
PREPARATION = '''
import contextlib
import io
import json
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import spdcli
from generate.recorded import results
from generate.result_pages import section
from spdcli import cli
from spdcli.edits.script import load_script
from spdcli.engine.forward import clean_pass
from spdcli.engine.target import Batch
from spdcli.figures.curves import save_activity
from spdcli.targets.architectures import architecture_of
from spdcli.targets.huggingface import LanguageModel, build_target

torch.set_num_threads(1)
SMALL = {"target.length": 6, "target.vocabulary": 20, "train.steps": 2, "train.batch": 4, "slices.C": 5,
         "importance.gate_width": 2, "decompose.steps": 2, "decompose.batch": 2}


def target_of(model):
    """The target, whose own pass through the blocks gives the model's next-token distribution."""
    target = build_target(LanguageModel(model.eval(), None, architecture_of(model.config.model_type), Path()), False)
    tokens = torch.arange(12).reshape(2, 6)
    own = clean_pass(target, Batch.everywhere(tokens), ()).log_probs
    torch.testing.assert_close(own, model(tokens).logits.log_softmax(-1).flatten(0, 1), atol=1e-4, rtol=1e-4)
    return target


def json_of(command):
    """What a command of the copy prints."""
    sys.argv, printed = [*command.split(), "--json"], io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main()
    return json.loads(printed.getvalue())


'''


class Example(NamedTuple):
    """A block of CONTRIBUTING.md that is put somewhere: `place` is a file, or TRY; `below` a line of it."""

    place: str
    below: str
    text: str


def examples() -> list[Example]:
    blocks = re.findall(r'^```\w+ title="([^"]+)"(?: below="([^\n]*)")?\n(.*?)^```$', TEXT, re.DOTALL | re.MULTILINE)
    return [Example(*block) for block in blocks]


def put(example: Example, root: Path) -> None:
    """Writes an example where its title says: below a line, at the end of a file, or into a new one."""
    path = root / example.place
    if not example.below:
        before = path.read_text(encoding="utf-8") + "\n\n" if path.exists() else ""
        path.write_text(before + example.text, encoding="utf-8")
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    number = lines.index(example.below + "\n") + 1
    path.write_text("".join([*lines[:number], example.text, *lines[number:]]), encoding="utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources with every example put in."""
    root = tmp_path_factory.mktemp("sources")
    for name in ("spdcli", "recipes", "docs"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.png", "*.svg"))
    for example in examples():
        if example.place != TRY:
            put(example, root)
    return root


def test_every_subject_has_an_example_that_is_tried() -> None:
    sections = re.split(r"^### ", TEXT.partition("## House style")[0], flags=re.MULTILINE)[1:]
    assert [section.partition("\n")[0] for section in sections] == [
        "A loss",
        "An importance function",
        "An architecture",
        "A command",
        "A figure",
        "A measure of an edit script",
        "A result",
    ]
    for section in sections:
        assert f'title="{TRY}"' in section, section.partition("\n")[0]


def test_the_examples_work(copy: Path, tmp_path: Path) -> None:
    tries = "\n\n".join(example.text for example in examples() if example.place == TRY)
    paths = os.pathsep.join([str(copy), str(copy / "docs")])
    finished = subprocess.run(
        [sys.executable, "-c", PREPARATION + tries],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr


def test_the_examples_are_in_the_house_style(copy: Path) -> None:
    ruff = [sys.executable, "-m", "ruff", "check", "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    files = sorted({str(copy / one.place) for one in examples() if one.place.endswith(".py")})
    finished = subprocess.run([*ruff, *files], cwd=copy, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout
