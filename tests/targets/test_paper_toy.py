"""The toy that is shipped: Table 3's, trained in full, and unchanged since."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

import spdcli
from spdcli.recipe.reading import load_recipe
from spdcli.targets.induction import toy_accuracy
from spdcli.targets.sources import file_in_package

NAME = "package:spdcli/targets/paper_toy"


def test_its_weights_are_those_that_were_trained():
    folder = file_in_package(NAME)
    digest, name = (folder / "SHA256SUMS").read_text(encoding="utf-8").split()
    assert digest == hashlib.sha256((folder / name).read_bytes()).hexdigest()


def test_it_was_trained_by_table_3():
    shipped = load_recipe(str(file_in_package(NAME) / "recipe.toml")).recipe
    published = load_recipe("induction").recipe
    assert (shipped.target, shipped.train, shipped.seed) == (published.target, published.train, published.seed)


def test_it_is_taken_apart_by_name_and_knows_every_answer(tmp_path: Path):
    run = spdcli.decompose(
        "induction-quick", tmp_path / "run", **{"target.path": NAME, "decompose.steps": 1, "decompose.batch": 2}
    )
    assert run.subject.toy is not None
    assert toy_accuracy(run.subject.toy, 2048, torch.Generator().manual_seed(1)) == 1.0
