"""`spd eval`, and `load`, which gives what the commands use."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from command_runs import check_numbers
from small_runs import one_line

import spdcli
from spdcli.engine.forward import clean_pass
from spdcli.engine.tables import losses_where
from spdcli.files import load_tensors
from spdcli.runs.directory import DECOMPOSITION, TOY_WEIGHTS, RunDirectory
from spdcli.runs.opening import flat

WORSE = "warning: this decomposition is worse than none: recon is "  # a random toy after eight steps


def test_load_gives_what_the_commands_use(spd, recipe, straight):
    run = spdcli.load(str(straight))
    tensors, _ = load_tensors(straight / DECOMPOSITION)
    state = run.decomposition.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in tensors.items())
    assert flat(run.recipe.model_dump()) == flat(RunDirectory(straight).recipe.model_dump())
    occurrence = json.loads(spd("inspect", straight, "--token", "s", "--json")[1])["occurrences"][0]
    tokens = torch.tensor([[6 if word == "s" else int(word) for word in occurrence["text"].split()]])
    batch = run.subject.batches(torch.Generator()).select(torch.tensor([0]))
    batch = type(batch)(tokens, batch.valid, batch.looked)
    with torch.no_grad():
        g, _ = run.decomposition.importance(clean_pass(run.subject.target, batch, run.decomposition.names).inputs)
    shown = {entry["slice"]: entry["importance"] for entry in occurrence["slices"]}
    there = {f"{m}:{c}": x for m, v in g.items() for c, x in enumerate(v[0, occurrence["position"]].tolist()) if x > 0}
    assert len(shown) == min(20, len(there))
    assert shown == pytest.approx({address: there[address] for address in shown}, abs=1e-6)


@pytest.mark.parametrize("command", [["eval"], ["inspect"], ["inspect", "--json"]], ids=" ".join)
def test_a_missing_run_is_one_line(spd, recipe, tmp_path, command):
    code, printed, err = spd(command[0], tmp_path / "nowhere", *command[1:])
    assert (code, printed) == (2, "")
    one_line(err, f"{tmp_path / 'nowhere'}: no run here")
    assert spd("train", recipe, "--out", tmp_path / "toy")[0] == 0
    code, printed, err = spd(command[0], tmp_path / "toy", *command[1:])
    assert (code, printed) == (2, "")
    one_line(err, f"{tmp_path / 'toy'} holds a trained toy and no decomposition")
    (tmp_path / "toy" / TOY_WEIGHTS).rename(tmp_path / "elsewhere")
    code, printed, err = spd(command[0], tmp_path / "toy", *command[1:])
    assert (code, printed) == (2, "")
    one_line(
        err, f"{tmp_path / 'toy'} is not finished: there is no decomposition.safetensors", "--force begins it anew"
    )


def test_an_unfinished_run_says_how_to_go_on(spd, straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    (run / DECOMPOSITION).unlink()
    code, _, err = spd("eval", run)
    assert code == 2
    one_line(err, f"{run} is not finished: there is no {DECOMPOSITION}")
    told = err.splitlines()[1].removeprefix("hint: ")
    assert told.endswith(f"--out {run} --resume goes on with it")
    assert spd(*told.removesuffix(" goes on with it").split()[1:])[0] == 0
    assert (run / DECOMPOSITION).read_bytes() == (straight / DECOMPOSITION).read_bytes()


METRICS = set(losses_where(lambda loss: loss.reported))


CONTRACT = ("unique", "total_active", "metrics", "standard_error", "attention_kl", "accuracy")


def check_contract(data):
    """What other programs rely on is there; more keys are welcome."""
    check_numbers({key: data[key] for key in CONTRACT})


def test_eval_of_a_toy_keeps_the_contract(spd, straight):
    code, printed, err = spd("eval", straight, "--sequences", 20, "--json")
    assert code == 0
    assert err.startswith(WORSE)
    data = json.loads(printed)
    assert json.loads((straight / "eval.json").read_text()) == data
    assert (data["schema"], data["run"], data["target"], data["sequences"]) == (
        "spd.eval/2", str(straight), "induction", 20,
    )  # fmt: skip
    names = ["Q0", "K0", "V0", "Q1", "K1", "V1"]
    assert list(data["active"]) == list(data["unique"]) == names
    assert all(set(classes) == {"s1", "m", "s2", "random"} for classes in data["active"].values())
    assert data["total_active"] == sum(data["unique"].values())
    assert set(data["metrics"]) == set(data["standard_error"]) == METRICS
    assert len(data["attention_kl"]) == 2
    assert set(data["accuracy"]) == {"target", "masked"}
    check_contract(data)


def test_eval_prints_table_1_beside_the_papers(spd, straight):
    code, printed, _ = spd("eval", straight, "--sequences", 20)
    assert code == 0
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    rows = {line.split()[1]: line for line in reversed(lines)}  # Table 1 comes before the circuit's tables
    assert {"Q0", "K0", "V0", "Q1", "K1", "V1", "faithfulness", "recon", "recon_layerwise"} <= rows.keys()
    assert "(5.053)" in rows["V1"]
    assert rows["V1"].rstrip().endswith("(11) │")
    assert "0.385" in printed
    assert printed.splitlines()[-1] == str(straight / "eval.json")
    code, printed, err = spd("eval", straight, "--sequences", 4, "-q")
    assert (code, printed) == (0, f"{straight / 'eval.json'}\n")
    assert err.startswith(WORSE)


def test_eval_takes_a_threshold_and_a_seed(spd, model_run):
    def measured(*options):
        data = json.loads(spd("eval", model_run, "--json", *options)[1])
        return data["total_active"], data["metrics"]["recon"], data["metrics"]["stochastic_recon"]

    active, recon, stochastic = measured()
    assert active > 0
    assert measured("--threshold", 1.0) == (0, recon, stochastic)
    assert measured("--seed", 0) == (active, recon, stochastic)  # the recipe's own
    assert measured("--seed", 1)[:2] == (active, recon)
    assert measured("--seed", 1)[2] != stochastic
    assert spd("eval", model_run, "--sequences", 1)[0] == 2


@pytest.mark.parametrize("prompts", [1, 2])
def test_eval_of_a_language_model_keeps_the_contract(spd, model_recipe_file, tmp_path, prompts):
    texts = ["Kobe Bryant plays professional basketball", "Tiger Woods plays the sport of golf"][:prompts]
    out = tmp_path / "run"
    assert spd("decompose", model_recipe_file, "--out", out, "--set", f"data.prompts={json.dumps(texts)}")[0] == 0
    code, printed, _ = spd("eval", out, "--json")
    assert code == 0
    data = json.loads(printed)
    assert (data["schema"], data["target"], data["sequences"]) == ("spd.eval/2", "huggingface", prompts)
    assert list(data["active_at"]) == ["h.1.attn.c_attn", "h.1.attn.c_proj", "h.1.mlp.c_fc", "h.1.mlp.c_proj"]
    places = [f"{prompt + 1}:{t}" for prompt in range(prompts) for t in range((5, 7)[prompt])]
    assert all(list(counts) == places for counts in data["active_at"].values())
    assert set(data["metrics"]) == set(data["standard_error"]) == METRICS
    assert (data["standard_error"]["recon"] is None) == (prompts == 1)
    assert set(data["cross_entropy"]) == set(data["accuracy"]) == {"target", "masked"}
    assert [answer["answer"] for answer in data["answers"]] == [" basketball", " golf"][:prompts]
    check_contract(data)
    code, printed, _ = spd("eval", out)
    assert code == 0
    for text in ("Bryant", "slices are active somewhere", "Probability of the answer", "Cross-entropy"):
        assert text in printed
