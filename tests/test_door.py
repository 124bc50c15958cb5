"""The Python door: what `import spdcli` offers, against the commands and against weights that are put in by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_runs import MODEL, TOY, save_toy, spd_here, toy_recipe
from torch import nn

import spdcli
from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.masks import importance_masks
from spdcli.engine.target import Batch
from spdcli.records import plain
from spdcli.runs.training import SURE

KOBE = "Kobe Bryant plays professional basketball"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The small toy recipe as a file, its toy there already."""
    folder = tmp_path_factory.mktemp("door")
    toy = save_toy(folder / "toy", toy_recipe(folder=folder))
    path = folder / "small.toml"
    path.write_text(TOY.replace('kind = "induction"', f'kind = "induction"\npath = "{toy}"'))
    return path


@pytest.fixture(scope="module")
def model_file(tmp_path_factory, tiny_gpt2_dir):
    path = tmp_path_factory.mktemp("model") / "model.toml"
    path.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    return path


@pytest.fixture(scope="module")
def language_run(model_file):
    return spdcli.decompose(model_file)


@pytest.fixture(scope="module")
def toy_run(recipe):
    return spdcli.decompose(recipe)


def equal(one, other):
    first, second = one.decomposition.state_dict(), other.decomposition.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


# --- from a recipe to a run --------------------------------------------------------------------------


def test_in_memory_is_the_run_directory_bit_for_bit(recipe, toy_run, tmp_path, monkeypatch, capsys):
    code, _, err = spd_here(monkeypatch, capsys)("decompose", recipe, "--out", tmp_path / "run", "-q")
    assert code == 0, err
    assert toy_run.directory is None
    assert equal(toy_run, spdcli.load(tmp_path / "run"))


def test_a_toy_is_trained_in_memory_as_it_is_into_a_directory(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(TOY)
    inside = spdcli.decompose(path)
    outside = spdcli.decompose(path, tmp_path / "run")
    assert equal(inside, outside)
    assert (tmp_path / "run/toy/figures/training.png").is_file()
    assert not any(tmp_path.glob("*toy*"))


def test_nothing_is_written_in_memory(model_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spdcli.decompose(model_file)
    assert not list(tmp_path.iterdir())


def test_settings_seed_and_progress(recipe):
    lines = []
    run = spdcli.decompose(recipe, progress=lines.append, seed=7, **{"decompose.steps": 3, "losses.minimality": 0.3})
    assert (run.recipe.seed, run.recipe.decompose.steps, run.recipe.losses.minimality) == (7, 3, 0.3)
    assert [(line.done, line.total) for line in lines if line.total] == [(1, 3), (2, 3), (3, 3)]
    assert str(lines[-1]).startswith("3/3  loss ")


def test_a_recipe_may_be_its_sections(recipe, toy_run):
    sections = spdcli.api.load_recipe(recipe).recipe.model_dump(exclude_none=True)
    before = repr(sections)
    run = spdcli.decompose(sections, **{"decompose.steps": 8})
    assert equal(run, toy_run)
    assert repr(sections) == before
    assert equal(spdcli.decompose(toy_run.recipe), toy_run)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"decompose.stepz": 3}, "stepz"),
        ({"decompose.steps": 0}, "decompose.steps=0"),
        ({"no key": 1}, "is no setting"),
    ],
)
def test_mistakes_are_the_commands_own(recipe, settings, said):
    with pytest.raises(spdcli.UsageError if "no key" in settings else spdcli.RecipeError, match=said):
        spdcli.decompose(recipe, **settings)


def test_a_directory_that_holds_a_run_is_refused(recipe, tmp_path):
    spdcli.decompose(recipe, tmp_path / "run")
    with pytest.raises(spdcli.UsageError, match="holds another run"):
        spdcli.decompose(recipe, tmp_path / "run")
    resumed = spdcli.decompose(recipe, tmp_path / "run", resume=True, **{"decompose.steps": 9})
    assert resumed.home.metrics()[-1]["step"] == 9
    with pytest.raises(spdcli.UsageError, match="run directory"):
        spdcli.decompose(recipe, resume=True)


def test_ctrl_c_in_memory_says_that_nothing_was_kept(recipe, monkeypatch):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("spdcli.runs.training.start_decomposition", press)
    with pytest.raises(spdcli.Interrupted, match="nothing was kept"):
        spdcli.decompose(recipe)


def test_it_works_outside_the_main_thread(recipe, toy_run):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        assert equal(pool.submit(spdcli.decompose, recipe).result(), toy_run)


def test_a_toy_is_trained(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(TOY)
    warnings = []
    trained = spdcli.train_toy(path, progress=warnings.append, **{"train.steps": 3})
    assert trained.records[-1]["step"] == 3
    assert trained.accuracy < SURE
    assert [line for line in warnings if line.warning and "train it longer" in line.text]
    again = spdcli.train_toy(path, tmp_path / "toy", **{"train.steps": 3})
    assert all(torch.equal(a, b) for a, b in zip(trained.toy.parameters(), again.toy.parameters(), strict=True))
    assert (tmp_path / "toy/figures/training.svg").is_file()


# --- what a run is ------------------------------------------------------------------------------------


def test_a_run_is_one_line(toy_run, language_run):
    for run in (toy_run, language_run):
        assert "\n" not in repr(run)
        assert len(repr(run)) < 120
    assert "in memory" in repr(toy_run)


def test_slices_and_matrices(language_run):
    name = language_run.matrices[0]
    U, V = language_run.slices(name)
    weight = language_run.subject.target.matrices[name].weight
    assert (U.shape, V.shape) == ((weight.shape[0], 6), (6, weight.shape[1]))
    assert not U.requires_grad


def test_importances_of_a_text_are_those_of_its_ids(language_run):
    ids = torch.tensor(language_run.tokenizer(KOBE)["input_ids"])
    assert torch.equal(language_run.tokens(KOBE), ids)
    by_text, by_ids = language_run.importances(KOBE), language_run.importances(ids.tolist())
    batch = Batch.everywhere(ids[None])
    clean = clean_pass(language_run.subject.target, batch, language_run.matrices)
    g, _ = language_run.decomposition.importance(clean.inputs)
    for name in language_run.matrices:
        assert by_text[name].shape == (len(ids), 6)
        assert torch.equal(by_text[name], by_ids[name])
        assert torch.equal(by_text[name], g[name][0])
    assert language_run.importances(ids.expand(2, -1))[name].shape == (2, len(ids), 6)


def test_importances_of_the_toys_tokens(toy_run):
    g = toy_run.importances("3 s 1 4 s")
    assert g["Q0"].shape == (5, 5)
    assert torch.equal(g["V1"], toy_run.importances([3, 6, 1, 4, 6])["V1"])
    with pytest.raises(spdcli.UsageError, match="no token"):
        toy_run.importances("3 x 1")
    with pytest.raises(spdcli.UsageError, match="shape"):
        toy_run.importances(torch.zeros(2, 2, 2, dtype=torch.long))


# --- the masked module --------------------------------------------------------------------------------


def logits_of(run, tokens):
    """Next-token logits `[B, T, N]` by the module's own forward pass."""
    out = run.model(tokens)
    return run.model.unembed(run.model.norm(out)) if run.subject.toy is not None else out.logits


@pytest.mark.parametrize("which", ["toy_run", "language_run"])
def test_the_active_slices_alone_answer_as_the_engine_says(which, request):
    run = request.getfixturevalue(which)
    tokens = torch.stack([run.tokens(text) for text in (["3 s 1 4 s", "1 s 2 2 s"] if which == "toy_run" else [KOBE])])
    batch = Batch.everywhere(tokens)
    clean = clean_pass(run.subject.target, batch, run.matrices)
    g, _ = run.decomposition.importance(clean.inputs)
    wanted = masked_logits(run.subject.target, run.decomposition, clean, importance_masks(g, run.decomposition.delta))
    before = logits_of(run, tokens)
    with torch.no_grad(), run.masked(active=True) as model:
        assert model is run.model
        masked = logits_of(run, tokens)
    torch.testing.assert_close(masked.flatten(0, 1), wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(masked, before, atol=1e-3)
    assert torch.equal(logits_of(run, tokens), before)  # closed, it is the target again


def test_given_masks_against_weights_put_in_by_hand(language_run):
    name = language_run.matrices[2]
    U, V = language_run.slices(name)
    matrix = language_run.subject.target.matrices[name]
    tokens, mask = language_run.tokens(KOBE)[None], torch.rand(6)
    with torch.no_grad(), language_run.masked({name: mask}, delta=0.25):
        masked = language_run.model(tokens).logits
    with in_place(matrix, (U * mask) @ V + 0.25 * (matrix.weight - U @ V)):
        wanted = language_run.model(tokens).logits
    torch.testing.assert_close(masked, wanted, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), language_run.masked({name: torch.ones(tokens.shape[1], 6)}, delta=1.0):
        torch.testing.assert_close(
            language_run.model(tokens).logits, language_run.model.forward(tokens).logits, atol=1e-5, rtol=1e-4
        )


@contextmanager
def in_place(matrix, weight):
    before = matrix.weight.clone()
    with torch.no_grad():
        matrix.weight.copy_(weight)
        yield
        matrix.weight.copy_(before)


def test_padding_and_hooks_of_others(language_run):
    tokens = language_run.tokens(KOBE)[None]
    padded = torch.cat([tokens, torch.zeros(1, 2, dtype=torch.long)], dim=1)
    real = (torch.arange(padded.shape[1]) < tokens.shape[1])[None]
    seen = []
    handle = language_run.model.transformer.h[1].register_forward_hook(lambda *hook: seen.append(hook[2]))
    with torch.no_grad(), language_run.masked(active=True):
        alone = language_run.model(input_ids=tokens).logits
        beside = language_run.model(input_ids=padded, attention_mask=real.long()).logits
    handle.remove()
    assert seen
    torch.testing.assert_close(beside[:, : tokens.shape[1]], alone, atol=1e-5, rtol=1e-4)


def test_what_a_masked_model_cannot_be_called_with(language_run):
    tokens = language_run.tokens(KOBE)[None]
    name = language_run.matrices[0]
    with pytest.raises(spdcli.UsageError, match="active=True"), language_run.masked():
        pass
    with torch.no_grad():
        cache = language_run.model(tokens, use_cache=True).past_key_values
        for call, said in (
            (lambda: language_run.model(torch.zeros(1, 2, 32)), "token ids"),
            (lambda: language_run.model(tokens, past_key_values=cache), "cached"),
            (
                lambda: language_run.model(tokens, attention_mask=torch.tensor([[0] + [1] * (tokens.shape[1] - 1)])),
                "end",
            ),
        ):
            with language_run.masked(active=True), pytest.raises(spdcli.UsageError, match=said):
                call()
        for masks, said in (({"nowhere": torch.ones(6)}, "nowhere"), ({name: torch.ones(5)}, "shape")):
            with language_run.masked(masks), pytest.raises(spdcli.UsageError, match=said):
                language_run.model(tokens)
    assert torch.isfinite(language_run.model(tokens).logits).all()  # every one of them was closed again


# --- the door itself ----------------------------------------------------------------------------------


def test_the_door_is_light_and_typed():
    code = (
        "import sys, spdcli; dir(spdcli); spdcli.SpdError;"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'rich'} & {*sys.modules};"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=os.environ).returncode == 0
    for name in spdcli.__all__:
        assert getattr(spdcli, name).__doc__ or name == "__version__"
        assert name in dir(spdcli)
    assert (Path(spdcli.__file__).parent / "py.typed").is_file()
    with pytest.raises(AttributeError, match="nothing"):
        spdcli.nothing  # noqa: B018


# --- a module of one's own ------------------------------------------------------------------------------


class Gated(nn.Module):
    """A transformer of nobody's family: RMS norms, a gated MLP, biases here and there, logits as its answer."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wte = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(GatedBlock() for _ in range(2))
        self.norm = nn.RMSNorm(8)
        self.head = nn.Linear(8, 11)
        self.scale = scale

    def forward(self, tokens):
        hidden = self.wte(tokens)
        for layer in self.layers:
            hidden = layer(hidden, 0.5)
        return self.scale * self.head(self.norm(hidden))


class GatedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(8)
        self.mix, self.gate, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, hidden, share):
        past = hidden.cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[None, :, None]
        hidden = hidden + share * self.mix(self.norm(past))
        x = self.norm(hidden)
        return hidden + self.down(torch.sigmoid(self.gate(x)) * self.up(x))


NAMES = {f"{i}.{part}": f"layers.{i}.{part}" for i in range(2) for part in ("mix", "gate", "up", "down")}
OWN = {
    "name": "own",
    "slices": {"C": 9, "init": "svd_span", "delta": True},
    "importance": {"kind": "vector", "gate_width": 3, "basis": "span"},
    "losses": {"stochastic_recon": 1, "recon": 1, "recon_layerwise": 1, "minimality": 0.1},
    "decompose": {"batch": 4, "steps": 5, "log_every": 1},
}


def gated_target(module=None, **changes):
    parts = {"blocks": ["layers.0", "layers.1"], "matrices": NAMES, "unembedding": "head", "final_norm": "norm"}
    return spdcli.module_target(module or Gated(), **(parts | changes))


@pytest.fixture(scope="module")
def data():
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(5))


def test_a_module_is_decomposed_saved_and_opened_again(data, tmp_path):
    run = spdcli.decompose(OWN, tmp_path / "run", target=gated_target(), data=data)
    assert list(run.importances("1 2 3")) == list(NAMES)
    again = spdcli.load(tmp_path / "run", target=gated_target(), data=data)
    assert equal(run, again)
    torch.testing.assert_close(again.importances(data)["1.up"], run.importances(data)["1.up"])
    with pytest.raises(spdcli.SpdError, match="which only Python has"):
        spdcli.load(tmp_path / "run")


def test_a_modules_masks_of_one_are_the_module(data):
    run = spdcli.decompose(OWN, target=gated_target(), data=data)
    before = run.model(data)
    with torch.no_grad(), run.masked({name: torch.ones(9) for name in run.matrices}, delta=1.0):
        torch.testing.assert_close(run.model(data), before, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), run.masked(active=True):
        assert not torch.allclose(run.model(data), before, atol=1e-3)


def test_a_modules_data_may_be_drawn_anew(data):
    drawn = []

    def draw(generator):
        drawn.append(torch.randint(11, (3, 6), generator=generator))
        return drawn[-1]

    spdcli.decompose(
        {**OWN, "slices": {"C": 4}, "importance": {"kind": "vector", "gate_width": 3}}, target=gated_target(), data=draw
    )
    assert len(drawn) == 1 + OWN["decompose"]["steps"]
    assert len({tuple(tokens.flatten().tolist()) for tokens in drawn}) == len(drawn)


def test_a_shipped_recipe_serves_a_module_too(data):
    run = spdcli.decompose("induction-quick", target=gated_target(), data=data, **{"decompose.steps": 1, "slices.C": 4})
    assert run.recipe.target.kind == "module"


class Doubled(nn.Linear):
    """Not x W + b."""

    def forward(self, x):
        return 2 * super().forward(x)


def doubled():
    module = Gated()
    module.layers[0].up = Doubled(8, 12)
    return module


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (lambda: {"module": Gated(scale=1.1)}, "final norm and the unembedding give log-probabilities that are"),
        (lambda: {"final_norm": None}, "nats from the module's own"),
        (lambda: {"module": doubled()}, r"matrix 0\.up as x W \+ b"),
        (lambda: {"blocks": ["layers.1", "layers.0"]}, "in the order"),
        (lambda: {"blocks": ["layers.0"], "matrices": {"0.up": "layers.0.up"}}, "nats from"),
        (lambda: {"blocks": ["layers.0", "layers.7"]}, "no part 'layers.7'"),
        (lambda: {"matrices": {"norm": "layers.0.norm"}}, "no weight of two dimensions"),
        (lambda: {"matrices": {"head": "head"}}, "none of the blocks"),
        (lambda: {"blocks": ["layers.0.gate", "layers.1"], "matrices": {}}, "residual stream"),
    ],
)
def test_a_module_that_is_described_wrongly_is_refused(changes, said):
    with pytest.raises(spdcli.UsageError, match=said):
        gated_target(**changes())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "needs data"),
        (torch.zeros(2, 3), "shape"),
        (torch.full((2, 3), 11), "token 11"),
        (torch.zeros(2, 1).long(), "two"),
    ],
)
def test_data_that_cannot_be_is_refused(data, said):
    with pytest.raises(spdcli.UsageError) as refused:
        spdcli.decompose(OWN, target=gated_target(), data=data)
    assert said in f"{refused.value.message} {refused.value.hint}"


def test_precision_decides_what_is_rounding():
    gated_target(Gated().double())


# --- what the commands say, without them ------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved_run(model_file, tmp_path_factory):
    return spdcli.decompose(model_file, tmp_path_factory.mktemp("saved") / "run")


@pytest.fixture
def answer(saved_run, monkeypatch, capsys):
    """The JSON of a command on the saved run."""

    def run(command, *options):
        code, out, err = spd_here(monkeypatch, capsys)(command, saved_run.home.path, *options, "--json")
        assert code == 0, err
        return json.loads(out)

    return run


def test_evaluate_inspect_and_svd_are_the_commands(saved_run, answer):
    evaluation, inspection, curves = saved_run.evaluate(), saved_run.inspect(" Bryant", top=3), saved_run.svd(0.01)
    for record, said in (
        (evaluation, answer("eval")),
        (inspection, answer("inspect", "--token", " Bryant", "--top", "3")),
        (curves, answer("svd", "--tolerance", "0.01")),
    ):
        values = plain(record)
        assert values.keys() & said.keys()
        assert {key: said[key] for key in values} == values
