"""`spd suppress` and `spd ablate`, from the command line to a checkpoint or a patch, and back bit for bit."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_runs import MODEL, TOY, one_line, save_toy, spd_here, toy_recipe
from transformers import AutoModelForCausalLM, AutoTokenizer

from spdcli.edits.choices import TOGETHER
from spdcli.edits.patches import KEY, load_patch, restored, shortfall, weight_hash
from spdcli.edits.suppression import Factors, subtract
from spdcli.files import load_tensors
from spdcli.runs.loading import load

FC, UP = "h.1.mlp.c_fc", "layers.1.mlp.up_proj"
TWO = ["--slice", f"{FC}:0", "--slice", f"{FC}:3", "--slice", "h.1.attn.c_proj:2"]


@pytest.fixture
def spd(monkeypatch, capsys):
    return spd_here(monkeypatch, capsys)


def make_run(spd, folder, model, *changes):
    recipe = folder / "model.toml"
    recipe.write_text(MODEL.replace("MODEL", str(model)))
    settings = [part for change in ("slices.init='svd'", *changes) for part in ("--set", change)]
    code, _, err = spd("decompose", recipe, "--out", folder / "run", *settings)
    assert code == 0, err
    return folder / "run"


@pytest.fixture
def run(spd, tmp_path, tiny_gpt2_dir):
    """A finished run on the tiny GPT-2, whose embeddings are tied."""
    return make_run(spd, tmp_path, tiny_gpt2_dir)


@pytest.fixture
def toy_run(spd, tmp_path):
    trained = save_toy(tmp_path / "trained", toy_recipe(folder=tmp_path))
    recipe = tmp_path / "toy.toml"
    recipe.write_text(TOY.replace('"induction"', f'"induction"\npath = "{trained}"'))
    assert spd("decompose", recipe, "--out", tmp_path / "run")[0] == 0
    return tmp_path / "run"


def answer(spd, *arguments):
    facts = [] if "--facts" in arguments else ["--no-facts"]
    code, out, err = spd(*arguments, *facts, "--json")
    assert code == 0, err
    return json.loads(out)


def answers_of(folder, effects):
    """The probability of each effect's token, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for effect in effects:
        ids = torch.tensor([tokenizer(effect["prompt"])["input_ids"]])
        with torch.no_grad():
            found.append(model(ids[:, :-1]).logits[0, -1].softmax(-1)[ids[0, -1]].item())
    return found


# --- the patch's arithmetic ------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DTYPES),
    st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6)),
    st.sampled_from([1e-6, 1e-2, 1.0, 1e3]),
)
def test_what_was_subtracted_comes_back_bit_for_bit(dtype, shape, size):
    rows, columns, count, seed = shape
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(rows, columns, generator=generator).to(dtype)
    before[0, 0] = 0.0 if seed % 2 else -0.0
    read = torch.randn(rows, count, generator=generator).double()
    factors = Factors(read, size * torch.randn(count, columns, generator=generator).double())
    after = subtract(before, factors)
    back = restored(after, factors, shortfall(before, after, factors))
    assert weight_hash(back) == weight_hash(before)
    assert back.dtype == before.dtype


def test_bits_that_restore_are_few():
    """An edit of 3 % of a float32 weight: less than a tenth of the weight's own bytes."""
    torch.manual_seed(0)
    before = torch.randn(200, 300)
    factors = Factors(torch.randn(200, 1).double(), 0.03 * torch.randn(1, 300).double())
    restore = shortfall(before, subtract(before, factors), factors)
    assert restore.numel() < 0.1 * before.numel() * 4
    assert subtract(subtract(before, factors), Factors(factors.read, -factors.write)).ne(before).any()  # it is needed


def test_a_hash_is_of_values_in_their_order():
    weight = torch.arange(6.0).view(2, 3)
    assert weight_hash(weight.t().contiguous().t()) == weight_hash(weight)
    assert weight_hash(weight.view(3, 2)) == weight_hash(weight)
    assert weight_hash(weight.t()) != weight_hash(weight)
    assert weight_hash(weight.double()) != weight_hash(weight)


# --- saved checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "split", "llama"])
def test_a_saved_checkpoint_is_the_edited_model(family, spd, tmp_path, request):
    source = request.getfixturevalue("tiny_llama_dir" if family == "llama" else "tiny_gpt2_dir")
    folder = make_run(spd, tmp_path, source, *(["target.split_attention=true"] if family == "split" else []))
    names = {"gpt2": FC, "llama": UP, "split": "h.1.attn.c_attn.v"}
    out = tmp_path / "edited"
    made = answer(spd, "suppress", folder, "--slice", f"{names[family]}:0", "--save", out)
    assert made["saved"] == str(out)
    for effect, p in zip(made["effects"], answers_of(out, made["effects"]), strict=True):
        assert effect["after"] == pytest.approx(p, rel=1e-4)
        assert abs(effect["ratio"] - 1) > 1e-3  # something to see
    for effect, p in zip(made["effects"], answers_of(source, made["effects"]), strict=True):
        assert effect["before"] == pytest.approx(p, rel=1e-4)
    tensors, original = load_file(out / "model.safetensors"), load_file(source / "model.safetensors")
    module = names[family].removesuffix(".v")
    changed = [name for name in tensors if not torch.equal(tensors[name], original[name])]
    assert [name.split(".", 1)[1] for name in changed] == [f"{module}.weight"]
    assert tensors.keys() == original.keys()
    if family == "split":  # q and k are the third of `c_attn` on the left each
        assert torch.equal(tensors[changed[0]][:, :64], original[changed[0]][:, :64])
    record = json.loads((out / "spd_edit.json").read_text())
    assert record["effects"] == made["effects"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_a_saved_models_embeddings_stay_tied(spd, run, tmp_path):
    assert spd("suppress", run, *TWO, "--save", tmp_path / "edited")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert model.lm_head.weight is model.transformer.wte.weight
    code, _, err = spd(
        "decompose",
        tmp_path / "model.toml",
        "--out",
        tmp_path / "again",
        "--set",
        f"target.model='{tmp_path / 'edited'}'",
    )
    assert code == 0, err


def test_saving_never_destroys(spd, run, tmp_path):
    out = tmp_path / "edited"
    out.mkdir()
    code, printed, _ = spd("suppress", run, *TWO, "--save", out)  # empty: fine
    assert code == 0
    assert printed.splitlines()[-1] == str(out)
    weights = (out / "model.safetensors").read_bytes()
    code, _, err = spd("suppress", run, "--slice", f"{FC}:1", "--save", out)
    assert code == 2
    one_line(err, "holds another edited model", "--force")
    assert (out / "model.safetensors").read_bytes() == weights
    assert spd("suppress", run, "--slice", f"{FC}:1", "--save", out, "--force")[0] == 0
    assert (out / "model.safetensors").read_bytes() != weights
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    code, _, err = spd("suppress", run, *TWO, "--save", tmp_path / "mine", "--force")
    assert code == 2
    one_line(err, "holds no edited model")
    patch = tmp_path / "p.safetensors"
    assert spd("suppress", run, *TWO, "--patch", patch, "--save", out, "--force")[0] == 0
    code, _, err = spd("suppress", run, "--revert", patch, "--base", out, "--save", out, "--force")
    assert code == 2
    one_line(err, "is the base itself")
    assert spd("suppress", run, *TWO, "--patch", patch, "--force")[0] == 0
    code, _, err = spd("suppress", run, *TWO, "--save", tmp_path / "mine" / "thesis.txt")
    one_line(err, "is a file")


def test_a_failure_while_saving_leaves_the_old_model(spd, run, tmp_path, monkeypatch):
    out = tmp_path / "edited"
    assert spd("suppress", run, *TWO, "--save", out, "-q")[0] == 0
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spdcli.edits.checkpoints.write_json", full)
    code, _, err = spd("suppress", run, "--slice", f"{FC}:1", "--save", out, "--force")
    assert code == 1
    one_line(err, "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert json.loads((out / "spd_edit.json").read_text())["slices"] == TWO[1::2]


def test_a_toy_is_saved_for_target_path(spd, toy_run, tmp_path):
    made = answer(spd, "suppress", toy_run, "--slice", "V1:0", "--slice", "K0:1", "--save", tmp_path / "edited")
    assert len(made["effects"]) == 16
    recipe = tmp_path / "again.toml"
    recipe.write_text(TOY.replace('"induction"', f'"induction"\npath = "{tmp_path / "edited"}"'))
    assert spd("decompose", recipe, "--out", tmp_path / "again")[0] == 0
    toy = load(tmp_path / "again").subject.toy
    for effect in made["effects"]:
        tokens = torch.tensor([[6 if word == "s" else int(word) for word in effect["prompt"].split()]])
        p = toy.logits(tokens).softmax(-1)[0, int(effect["token"])].item()
        assert effect["after"] == pytest.approx(p, rel=2e-3)  # its logits go to ±100: float32 leaves that much


# --- patches ---------------------------------------------------------------------------------------------


def test_apply_then_revert_restores_every_bit(spd, run, tmp_path, tiny_gpt2_dir):
    patch, saved, applied, back = (tmp_path / name for name in ("p.safetensors", "saved", "applied", "back"))
    assert spd("suppress", run, *TWO, "--patch", patch, "--save", saved)[0] == 0
    put = answer(spd, "suppress", run, "--apply", patch, "--save", applied)
    off = answer(spd, "suppress", run, "--revert", patch, "--base", applied, "--save", back)
    weights = {folder: (folder / "model.safetensors").read_bytes() for folder in (saved, applied, back, tiny_gpt2_dir)}
    assert weights[saved] == weights[applied] != weights[tiny_gpt2_dir]
    assert weights[back] == weights[tiny_gpt2_dir]
    assert put["slices"] == off["slices"] == TWO[1::2]
    for one, other in zip(put["effects"], off["effects"], strict=True):
        assert one["before"] == pytest.approx(other["after"], rel=1e-4)
        assert one["after"] == pytest.approx(other["before"], rel=1e-4)


def test_a_patch_tells_what_it_is(spd, run, tmp_path, tiny_gpt2_dir):
    path = tmp_path / "p.safetensors"
    printed = spd("suppress", run, *TWO, "--patch", path)[1]
    assert printed.splitlines()[-1] == str(path)
    patch = load_patch(path)
    assert patch.about["format"] == 1
    assert patch.about["slices"] == TWO[1::2]
    assert patch.edit[FC].read.shape == (32, 2)
    assert patch.edit[FC].write.shape == (2, 128)
    base = load_file(tiny_gpt2_dir / "model.safetensors")[f"transformer.{FC}.weight"]
    assert patch.hashes("before")[FC] == weight_hash(base)
    assert patch.hashes("after")[FC] == weight_hash(subtract(base, patch.edit[FC]))
    assert [effect["token"] for effect in patch.about["evidence"]["effects"]] == [" basketball", " golf"]


def test_a_toys_patch_comes_off_again(spd, toy_run, tmp_path):
    patch, saved, back = (tmp_path / name for name in ("p.safetensors", "saved", "back"))
    assert spd("suppress", toy_run, "--slice", "V1:0", "--slice", "V1:2", "--patch", patch, "--save", saved)[0] == 0
    assert spd("suppress", toy_run, "--revert", patch, "--base", saved, "--save", back)[0] == 0
    original = load_file(tmp_path / "trained" / "target.safetensors")
    for name, tensor in load_file(back / "target.safetensors").items():
        assert torch.equal(tensor, original[name])


def test_another_base_is_refused(spd, run, tmp_path, tiny_gpt2_dir, tiny_llama_dir):
    patch, other = tmp_path / "p.safetensors", tmp_path / "other"
    assert spd("suppress", run, *TWO, "--patch", patch, "--save", tmp_path / "edited")[0] == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir)
    with torch.no_grad():
        model.transformer.get_submodule(FC).weight[3, 4] *= 1 + 2**-20
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny_gpt2_dir).save_pretrained(other)
    refusals = {
        ("--apply", patch, "--base", other): f"made for another base: sha256 of {FC}",
        ("--revert", patch, "--base", other): f"made for another base: sha256 of {FC}",
        ("--revert", patch): "does not have this edit",
        ("--apply", patch, "--base", tmp_path / "edited"): "has this edit already",
        ("--apply", patch, "--base", tiny_llama_dir): f"has no matrix '{FC}'",
    }
    for options, said in refusals.items():
        code, out, err = spd("suppress", run, *options, "--save", tmp_path / "never")
        assert (code, out) == (1, "")
        one_line(err, "refused", said)
    assert not (tmp_path / "never").exists()
    code, _, err = spd("suppress", run, "--apply", patch, "--base", tmp_path / "nowhere")
    assert code == 2
    one_line(err, "no such directory")


def changed(path, out, change):
    tensors, metadata = load_tensors(path)
    about = json.loads(metadata[KEY])
    change(tensors, about)
    save_file(tensors, out, {KEY: json.dumps(about)})


def test_a_damaged_patch_is_one_line(spd, run, tmp_path):
    path, bad = tmp_path / "p.safetensors", tmp_path / "bad.safetensors"
    assert spd("suppress", run, *TWO, "--patch", path, "--save", tmp_path / "edited")[0] == 0

    def refused(said, *options, code=1):
        ended, out, err = spd("suppress", run, *(options or ("--apply", bad)))
        assert (ended, out) == (code, "")
        one_line(err, said)

    bad.write_bytes(path.read_bytes()[:-7])
    refused("damaged")
    bad.write_text("no tensors")
    refused("damaged")
    save_file({"x": torch.zeros(1)}, bad)
    refused("no patch of spd suppress")
    changed(path, bad, lambda tensors, about: tensors.pop(f"write.{FC}"))
    refused("damaged")
    changed(path, bad, lambda tensors, about: about["matrices"][FC].pop("after"))
    refused("damaged")
    changed(path, bad, lambda tensors, about: about.update(format=2))
    refused("format 2")
    changed(path, bad, lambda tensors, about: tensors[f"write.{FC}"].mul_(1.5))
    refused("does not give the h.1.mlp.c_fc that it promises")
    changed(path, bad, lambda tensors, about: tensors.update({f"read.{FC}": torch.zeros(3, 2).double()}))
    refused("do not fit")
    revert = ("--revert", bad, "--base", tmp_path / "edited")
    changed(path, bad, lambda tensors, about: tensors[f"restore.{FC}"].add_(1))
    refused("damaged", *revert)
    other = lambda tensors, about: tensors.update({f"restore.{FC}": tensors["restore.h.1.attn.c_proj"].clone()})  # noqa: E731
    changed(path, bad, other)
    refused("of another shape", *revert)
    refused("no such file", "--apply", tmp_path / "nowhere", code=2)


# --- the commands ----------------------------------------------------------------------------------------


def test_suppress_keeps_its_contract(spd, run):
    data = answer(spd, "suppress", run, *TWO)
    assert data["schema"] == "spd.suppress/1"
    assert data["slices"] == TWO[1::2]
    assert (data["facts"], data["expectations"], data["saved"], data["patch"]) == (None, [], None, None)
    assert {"group", "prompt", "token", "before", "after", "kl"} <= data["effects"][0].keys()
    assert [row["matrix"] for row in data["matrices"]] == [FC, "h.1.attn.c_proj"]
    assert list(data["alone"]) == TWO[1::2]
    first = answer(spd, "suppress", run, *TWO[:2])
    assert first["effects"][0]["after"] == pytest.approx(data["alone"][f"{FC}:0"][0]["after"])
    assert first["alone"] == {}


def test_together_says_how_far_the_ways_are_apart(spd, run):
    literal = answer(spd, "suppress", run, *TWO)
    assert literal["together"] == "literal"
    for together in TOGETHER:
        data = answer(spd, "suppress", run, *TWO, "--together", together)
        assert data["together"] == together
        two, one = data["matrices"]
        assert two["forms"] == literal["matrices"][0]["forms"]
        assert two["removed"] == pytest.approx(two["forms"][together]["removed"])
        assert (two["forms"][together]["from_literal"] == 0) == (together == "literal")
        assert one["forms"][together]["removed"] == pytest.approx(one["removed"])
        assert (one["forms"][together]["from_literal"] == 0) == (together != "whole")
        assert two["difference"] == literal["matrices"][0]["difference"] > one["difference"] == 0
        table = spd("suppress", run, *TWO, "--no-facts", "--together", together)[1]
        assert f"done: {together}" in table
        assert all(f"{sizes['removed']:.4%}" in table for sizes in two["forms"].values())
        assert all(f"({sizes['from_literal']:.2e})" in table for sizes in list(two["forms"].values())[1:])


def test_prompts_from_the_command_line_and_stdin(spd, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the sport of golf\n\nthe sport of basketball\n"))
    for command in ("suppress", "ablate"):
        monkeypatch.setattr("sys.stdin", io.StringIO("the sport of golf\n\nthe sport of basketball\n"))
        data = answer(spd, command, run, *TWO, "--prompt", "Tiger Woods plays golf", "--prompt", "-")
        assert [effect["prompt"] for effect in data["effects"]] == [
            "Tiger Woods plays golf",
            "the sport of golf",
            "the sport of basketball",
        ]
        assert [effect["token"] for effect in data["effects"]] == [" golf", " golf", " basketball"]
        of_run = answer(spd, command, run, *TWO, "--no-facts")["effects"]
        (second,) = answer(spd, command, run, *TWO, "--no-facts", "--prompt", "2")["effects"]
        assert second["prompt"] == of_run[1]["prompt"]
        assert second["after"] == pytest.approx(of_run[1]["after"], rel=1e-5)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    code, _, err = spd("ablate", run, *TWO, "--prompt", "-")
    assert code == 2
    one_line(err, "standard input has no prompt")


def test_ablate_end_to_end(spd, run):
    data = answer(spd, "ablate", run, *TWO[:2], "--mlp", "0", "--matrix", "h.2.attn.c_attn", "--others", "sampled")
    assert data["schema"] == "spd.suppress/1"
    assert data["zeroed"] == ["h.2.attn.c_attn", "mlp 0"]
    assert list(data["alone"]) == [f"{FC}:0", "h.2.attn.c_attn", "mlp 0"]
    same = answer(spd, "ablate", run, *TWO[:2], "--mlp", "0", "--matrix", "h.2.attn.c_attn", "--others", "sampled")
    assert same == data
    every = answer(spd, "ablate", run, "--mlp", "all", "--figure")
    assert every["figures"] == [str(run / "figures" / f"mlp-zeroed.{kind}") for kind in ("png", "svg")]
    assert all(Path(path).stat().st_size > 1000 for path in every["figures"])
    assert list(every["alone"]) == ["mlp 0", "mlp 1", "mlp 2"]
    code, out, err = spd("ablate", run, *TWO[:2])
    assert code == 0
    assert "no delta component" in err
    assert "basketball" in out


def test_ablate_a_toy(spd, toy_run):
    data = answer(spd, "ablate", toy_run, "--slice", "K0:0", "--sequences", "3", "--others", "importance")
    assert len(data["effects"]) == 3
    for effect in data["effects"]:
        words = effect["prompt"].split()
        assert effect["token"] == words[words.index("s") + 1]
    of_three = ("--slice", "K0:0", "--sequences", "3", "--others", "importance")
    (third,) = answer(spd, "ablate", toy_run, *of_three, "--prompt", "3")["effects"]
    assert (third["prompt"], third["after"]) == (
        data["effects"][2]["prompt"],
        pytest.approx(data["effects"][2]["after"]),
    )
    data = answer(spd, "ablate", toy_run, "--matrix", "K0", "--prompt", "3 s 4 1 s")
    assert data["effects"][0]["token"] == "4"


def test_quiet_prints_numbers_alone(spd, run):
    for command in ("suppress", "ablate"):
        code, out, _ = spd(command, run, *TWO, "-q")
        assert code == 0
        assert [len(line.split("\t")) for line in out.splitlines()] == [3, 3]
        assert all(re.fullmatch(r"[\d.e+-]+", number) for line in out.splitlines() for number in line.split("\t"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["suppress"], "nothing to suppress"),
        (["suppress", "--apply", "a", "--slice", "x:1"], "--apply and --slice contradict"),
        (["suppress", "--revert", "a", "--patch", "x"], "--revert and --patch contradict"),
        (["suppress", "--revert", "a", "--together", "sequence"], "--revert and --together contradict"),
        (["suppress", "--apply", "a", "--revert", "b"], "--apply and --revert contradict"),
        (["suppress", "--slice", "x:1", "--base", "b"], "--base is what --apply or --revert works on"),
        (["suppress", "--slice", "x:1", "--patch", "."], ". is there already"),
        (["suppress", "--slice", "h.1.mlp.c_fd:1"], "the nearest is 'h.1.mlp.c_fc'"),
        (["suppress", "--slice", f"{FC}:6"], f"{FC} has the slices 0 to 5"),
        (["ablate"], "nothing to ablate"),
        (["ablate", "--mlp", "0", "--others", "on"], "--others is about the slices"),
        (["ablate", "--mlp", "3"], "layers 0 to 2"),
        (["ablate", "--mlp", "0", "--figure"], "--figure draws one MLP layer after the other"),
        (["ablate", "--mlp", "first"], "--mlp first: not a layer"),
        (["ablate", "--matrix", "h.9.mlp.c_fc"], "the target has no matrix 'h.9.mlp.c_fc'; the nearest is"),
        (["ablate", "--slice", "c_fc"], "'c_fc' is no slice"),
    ],
)
def test_bad_input_is_one_line(arguments, said, spd, run):
    code, out, err = spd(arguments[0], run, *arguments[1:])
    assert (code, out) == (2, "")
    one_line(err, said)


@pytest.mark.slow
@pytest.mark.usefixtures("user_cache")
def test_smollm2_of_a_gguf_file_is_saved_and_restored(spd, smollm2, tmp_path):
    """A GGUF-sourced model: loads in plain transformers, tied as before, and a patch comes off bit for bit."""
    from conftest import SMOLLM2

    folder = make_run(spd, tmp_path, SMOLLM2, "slices.matrices=['layers.0.mlp.up_proj']", "decompose.steps=1")
    patch, saved, back = (tmp_path / name for name in ("p.safetensors", "saved", "back"))
    up = ["--slice", "layers.0.mlp.up_proj:0", "--slice", "layers.0.mlp.up_proj:1"]
    made = answer(spd, "suppress", folder, *up, "--patch", patch, "--save", saved)
    for effect, p in zip(made["effects"], answers_of(saved, made["effects"]), strict=True):
        assert effect["after"] == pytest.approx(p, rel=1e-3, abs=1e-7)
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert spd("suppress", folder, "--revert", patch, "--base", saved, "--save", back)[0] == 0
    for name, tensor in load_file(back / "model.safetensors").items():
        assert torch.equal(tensor, smollm2.model.state_dict()[name]), name
    assert patch.stat().st_size < 0.1 * smollm2.model.get_submodule("model.layers.0.mlp.up_proj").weight.numel() * 4


# --- answers beside their prompts, and scores ------------------------------------------------------------


def test_answers_and_records_from_the_command_line(spd, run, tmp_path):
    rewrite = {"prompt": "{} plays", "subject": "Bryant", "target_true": {"str": "golf"}, "target_new": {"str": "obe"}}
    records = tmp_path / "records.json"
    records.write_text(json.dumps([{"requested_rewrite": rewrite, "neighborhood_prompts": ["Woods plays"]}]))
    asked = ["--prompt", "Kobe Bryant plays", "--answer", "professional golf", "--counterfact", records]
    report = answer(spd, "suppress", run, "--slice", f"{FC}:0", *asked)
    assert report["effects"][0]["token"] == " professional golf"
    assert list(report["scores"]) == ["counterfact"]
    assert report["scores"]["counterfact"]["specificity"]["prompts"] == 1
    assert report["scores"]["counterfact"]["score"] is None, "no paraphrases"
    code, out, _ = spd("suppress", run, "--slice", f"{FC}:0", "--no-facts", *asked)
    assert code == 0
    assert "specificity" in out
    assert "of 1" in out
    ablated = answer(spd, "ablate", run, "--slice", f"{FC}:0", *asked[:4])
    assert ablated["effects"][0]["target"] == pytest.approx(report["effects"][0]["before"], rel=1e-4)
    assert "scores" not in ablated
    for wrong, said in (
        (["--answer", "golf"], "--answer is there 1 times, --prompt 0"),
        (["--prompt", "a b", "--answer", " "], "--answer is blank"),
        (["--counterfact", tmp_path / "none.json"], "none.json: no such file"),
    ):
        code, _, err = spd("suppress", run, "--slice", f"{FC}:0", *wrong)
        assert code != 0
        one_line(err, said)


def test_strength_is_how_much_is_taken(spd, run):
    whole = answer(spd, "suppress", run, *TWO[:2])
    half = answer(spd, "suppress", run, *TWO[:2], "--strength", "0.5")
    assert half["matrices"][0]["removed"] == pytest.approx(whole["matrices"][0]["removed"] / 2)
    assert (whole["strength"], half["strength"]) == (1, 0.5)
