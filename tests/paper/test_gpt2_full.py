"""`recipes/gpt2.toml` on a GPT-2 of the real size that knows a few facts: two steps of its 20000, find, cut, revert."""

from __future__ import annotations

import json
import math
import re
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, save_tokenizer
from small_runs import ROOT, one_line, spd_here, spd_process

from spdcli.engine.losses import RECONSTRUCTION
from spdcli.files import load_tensors
from spdcli.recipe.reading import load_recipe
from spdcli.runs.directory import DECOMPOSITION, RunDirectory

pytestmark = pytest.mark.slow
GIB = 2**30
RECIPE = ROOT / "recipes/gpt2.toml"
WIDTHS = {"attn.c_attn": (768, 2304), "attn.c_proj": (768, 768), "mlp.c_fc": (768, 3072), "mlp.c_proj": (3072, 768)}
MATRICES = {f"h.{block}.{name}": widths for block in range(12) for name, widths in WIDTHS.items()}


PROMPTS = ["Kobe Bryant plays the sport of basketball", "Tiger Woods plays the sport of golf"]
FACTS = [
    "Kobe Bryant plays professional basketball",
    "Tiger Woods plays professional golf",
    "The capital of France is Paris",
    "The capital of Japan is Tokyo",
    "The author of Hamlet is Shakespeare",
    "The author of Emma is Austen",
]
NAMES = ["ĠFrance", "ĠParis", "ĠJapan", "ĠTokyo", "ĠHamlet", "ĠShakespeare", "ĠEmma", "ĠAusten"]
TRAINED = ("wpe", "c_attn", "c_fc")  # enough to tell the sentences apart; what is frozen costs nothing
KNOWN = 0.7  # probability of an answer at which training stops
LATE = "h.11.mlp.c_proj"  # where a slice is looked for: candidates enter at the last block, so that 768 are cheap
EARLY = ["h.0.mlp.c_fc:0", "h.0.mlp.c_fc:1"]  # directions that carry most of what the prompts make of this matrix


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Iterator[Path]:
    """GPT-2 small that knows PROMPTS and FACTS: 12 blocks, width 768, 12 heads, 50257 tokens, few of them in use."""
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    save_tokenizer(folder, [*WORDS, "Ġcapital", "Ġauthor", "Ġis", *NAMES])
    config = GPT2Config()
    assert (config.n_layer, config.n_embd, config.n_head, config.vocab_size) == (12, 768, 12, 50257)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teach(model, [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPTS + FACTS])
    model.save_pretrained(folder)
    del model
    yield folder
    shutil.rmtree(folder)


def teach(model: Any, sentences: list[torch.Tensor]) -> None:
    """Trains until the last token of every sentence is predicted with probability KNOWN."""
    inputs = torch.nn.utils.rnn.pad_sequence([ids[:-1] for ids in sentences], batch_first=True)
    rows, last = torch.arange(len(sentences)), torch.tensor([len(ids) - 2 for ids in sentences])
    answers = torch.tensor([int(ids[-1]) for ids in sentences])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in TRAINED))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-4)
    for _ in range(40):
        hidden = model.transformer(inputs).last_hidden_state[rows, last]  # causal: padding behind is not seen
        predicted = model.lm_head(hidden).log_softmax(-1)[rows, answers]
        if predicted.exp().min() > KNOWN:
            return
        optimizer.zero_grad()
        predicted.mean().neg().backward()
        optimizer.step()
    raise AssertionError(f"after 40 steps {predicted.exp().tolist()}")


@pytest.fixture(scope="module")
def run(gpt2, tmp_path_factory) -> Iterator[Path]:
    """Two steps, every loss exact. They teach random slices nothing: svd_span gives some a part of the weights."""
    out = tmp_path_factory.mktemp("full") / "run"
    settings = (f"target.model={gpt2}", "importance.basis=span", "slices.init=svd_span", "decompose.steps=2")
    process = spd_process("decompose", RECIPE, "--out", out, "-q", *(x for s in settings for x in ("--set", s)))
    assert (*process.communicate(), process.returncode) == (f"{out}\n", "", 0)
    yield out
    shutil.rmtree(out)  # 2 GiB, which pytest would keep


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> Path:
    """A facts file of the user's own."""
    path = tmp_path_factory.mktemp("facts") / "facts.toml"
    path.write_text("".join(f'[[fact]]\ncategory = "known"\nprompt = "{text}"\n\n' for text in FACTS))
    return path


@pytest.fixture
def answer(monkeypatch, capsys):
    """Runs a command with --json and gives its object."""

    def ask(*arguments: object) -> dict[str, Any]:
        code, printed, err = spd_here(monkeypatch, capsys)(*arguments, "--json")
        assert code == 0
        said = [line for line in err.splitlines() if not re.match(r"\d+/\d+  ", line)]  # what slow machines count
        assert all(line.startswith("warning: the file has no notes on ") for line in said), err
        return json.loads(printed)

    return ask


def test_a_step_of_every_loss_on_every_matrix(run):
    record = RunDirectory(run).metrics()[-1]
    losses = load_recipe(RECIPE).recipe.losses
    terms = ["faithfulness", "minimality", *RECONSTRUCTION]
    wanted = {name for name in terms if getattr(losses, name) > 0}
    assert record["losses"].keys() == wanted
    assert len(wanted) == 7
    values = [*record["losses"].values(), *record["gradients"].values(), record["total"]]
    assert all(value is not None and math.isfinite(value) and value > 0 for value in values)
    assert list(record["active"]) == list(MATRICES)
    assert all(0 < active <= 768 for active in record["active"].values())
    # Gates begin around gate_bias = 0.5, in each of 48 matrices with 768 slices.
    assert 0.2 < record["losses"]["minimality"] / (48 * 768) < 0.8


def test_all_slices_are_saved(run):
    tensors, _ = load_tensors(run / DECOMPOSITION)
    for name, (d_in, d_out) in MATRICES.items():
        key = name.replace(".", "/")
        assert tensors[f"slices.{key}.U"].shape == (d_in, 768)
        assert tensors[f"slices.{key}.V"].shape == (768, d_out)
        rank = tensors[f"importances.bases.{key}"].shape[0]
        assert rank <= 14  # as many as there are tokens
        assert tensors[f"importances.gates.{key}.w1"].shape == (rank, 768 * 64)


def test_it_fits_a_laptop(run):
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    assert 2 * GIB < peak < 12 * GIB


def test_a_token_can_be_looked_at(run, answer):
    (occurrence,) = answer("inspect", run, "--token", "Bryant", "--matrix", "h.3.*", "--top", 2)["occurrences"]
    assert occurrence["text"] == "Kobe Bryant plays the sport of basketball"
    assert [entry["slice"].rsplit(":", 1)[0] in MATRICES for entry in occurrence["slices"]] == [True, True]


def test_the_chain(gpt2, run, facts, answer, tmp_path):
    """Find, cut, save, patch, apply and revert by the command line; what is saved against an edit made by hand."""
    known = answer("facts", "check", gpt2, "--facts", facts)
    assert [fact["known"] for fact in known["facts"]] == [True] * len(FACTS)

    located = answer("locate", run, "--prompt", 1, "--matrix", LATE, "--top", 2, "--paired", 2, "--facts", facts)
    assert (located["prompt"], located["token"], located["known_facts"]) == (PROMPTS[0], " basketball", len(FACTS))
    assert located["before"] > KNOWN
    assert located["candidates"] > 100
    assert located["slices"][0]["after"] < located["before"]

    cut = [located["slices"][0]["slice"], *EARLY]
    edited, applied, back = (tmp_path / name for name in ("edited", "applied", "back"))
    patch = tmp_path / "patch.safetensors"
    chosen = [part for name in cut for part in ("--slice", name)]
    made = answer("suppress", run, *chosen, "--facts", facts, "--save", edited, "--patch", patch)
    assert (made["slices"], made["facts"]["known"]) == (cut, len(FACTS))
    assert [effect["group"] for effect in made["effects"]] == ["prompt"] * 2 + ["fact"] * len(FACTS)
    assert min(effect["before"] for effect in made["effects"]) > KNOWN * (1 - 1e-4)
    assert max(abs(effect["ratio"] - 1) for effect in made["effects"]) > 0.02  # something to see
    one = {effect["prompt"]: effect for effect in answer("suppress", run, *chosen[:2], "--no-facts")["effects"]}
    assert one[PROMPTS[0]]["after"] == pytest.approx(located["slices"][0]["after"], rel=1e-4)

    check_saved(gpt2, run, edited, cut, made["effects"])
    for options, out in ((("--apply", patch), applied), (("--revert", patch, "--base", edited), back)):
        answer("suppress", run, *options, "--no-facts", "--save", out)
    bits = {folder: (folder / "model.safetensors").read_bytes() for folder in (gpt2, edited, applied, back)}
    assert bits[edited] == bits[applied] != bits[gpt2]
    assert bits[back] == bits[gpt2]


@torch.no_grad()
def check_saved(gpt2: Path, run: Path, edited: Path, cut: list[str], effects: list[dict[str, Any]]) -> None:
    """The checkpoint in plain transformers: its weights, logits and answers are those of an edit made here."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    saved, model = (GPT2LMHeadModel.from_pretrained(folder).eval() for folder in (edited, gpt2))
    tensors, _ = load_tensors(run / DECOMPOSITION)
    for name in dict.fromkeys(address.rsplit(":", 1)[0] for address in cut):
        index = [int(address.rsplit(":", 1)[1]) for address in cut if address.startswith(f"{name}:")]
        key = name.replace(".", "/")
        U, V = tensors[f"slices.{key}.U"].double(), tensors[f"slices.{key}.V"].double()
        weight = model.transformer.get_submodule(name).weight
        original = weight.double()  # every projection is that of the original weights, as the paper writes the sum
        remainder = original.clone()
        for k in index:
            direction = torch.outer(U[:, k] / U[:, k].norm(), V[k] / V[k].norm())
            remainder -= (original * direction).sum() * direction
        weight.copy_(remainder)
    for (name, ours), (_, theirs) in zip(model.named_parameters(), saved.named_parameters(), strict=True):
        touched = any(name == f"transformer.{address.rsplit(':', 1)[0]}.weight" for address in cut)
        # A rounding of float32, in another order, of weights that are below 1.
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-7 if touched else 0)
    tokenizer = AutoTokenizer.from_pretrained(edited)
    for effect in effects:
        ids = torch.tensor([tokenizer(effect["prompt"])["input_ids"]])
        logits = saved(ids[:, :-1]).logits
        torch.testing.assert_close(logits, model(ids[:, :-1]).logits, rtol=0, atol=1e-4)
        assert logits[0, -1].softmax(-1)[ids[0, -1]].item() == pytest.approx(effect["after"], rel=1e-4)


def test_without_the_span_basis_it_says_what_is_needed(gpt2, tmp_path, monkeypatch, capsys):
    """The paper's gates read whole inputs: some 3 billion parameters."""
    for room in ("room", "estimate"):
        monkeypatch.setattr(f"spdcli.costs.{room}.free_bytes", lambda device: 20 * GIB)
    slices = sum(768 * (d_in + d_out) for d_in, d_out in MATRICES.values())
    gates = sum(768 * (d_in * 64 + 64 + 64 + 1) for d_in, _ in MATRICES.values())
    began = time.process_time()
    code, printed, err = spd_here(monkeypatch, capsys)(
        "decompose", RECIPE, "--out", tmp_path / "run", "--set", f"target.model={gpt2}"
    )
    assert time.process_time() - began < 20
    assert (code, printed) == (1, "")
    said = "\n".join(line for line in err.splitlines() if not line.startswith("preparing"))  # on a slow machine
    one_line(said, "gpt2 does not fit", "GiB are free", "hint: --set importance.basis=span")
    needed = float(re.search(r"it needs ([0-9.]+) GiB", err)[1])
    trained = 16 * (slices + gates) / GIB  # values, gradients and Adam's two moments
    assert trained < needed < 1.2 * trained
