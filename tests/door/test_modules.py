"""A module of one's own as a target: decomposed, saved and opened again, and refused where it is described wrongly."""

from __future__ import annotations

import pytest
import torch
from door_checks import equal
from torch import nn

import spdcli


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
    steps = OWN["decompose"]["steps"]
    assert (
        len(drawn) == 2 + steps
    )  # one to see what is drawn, and the first one twice: what it lacks is told beforehand
    assert len({tuple(tokens.flatten().tolist()) for tokens in drawn}) == 1 + steps


def test_a_shipped_recipe_serves_a_module_too(data):
    run = spdcli.decompose("induction-quick", target=gated_target(), data=data, **{"decompose.steps": 1, "slices.C": 4})
    assert run.recipe.target.kind == "module"


class Doubled(nn.Linear):
    """Not x W + b."""

    def forward(self, x):
        return 2 * super().forward(x)


class Said(Gated):
    """Its logits in a dict."""

    def forward(self, tokens):
        return {"logits": super().forward(tokens)}


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
        (lambda: {"blocks": ["layers.0.gate", "layers.1"], "matrices": {"gate": "layers.0.gate"}}, "residual stream"),
        (lambda: {"module": 5}, "the module is a int"),
        (lambda: {"module": nn.Linear(8, 11), "blocks": [nn.Linear(8, 8)]}, "no part"),
        (lambda: {"blocks": "layers"}, "blocks= is no list"),
        (lambda: {"matrices": {}}, "does not name each matrix once"),
        (lambda: {"matrices": ["layers.0.up"]}, "does not name each matrix once"),
        (lambda: {"matrices": {"a": "layers.0.up", "b": "layers.0.up"}}, "does not name each matrix once"),
        (lambda: {"matrices": dict(reversed(NAMES.items()))}, "order of execution"),
        (lambda: {"unembedding": "norm"}, "weights of shape"),
        (lambda: {"run": lambda tokens: Gated()(tokens.float())}, "cannot be called with token ids"),
        (lambda: {"module": Said(), "final_norm": None}, "nats from"),
    ],
)
def test_a_module_that_is_described_wrongly_is_refused(changes, said):
    with pytest.raises(spdcli.UsageError, match=said):
        gated_target(**changes())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "needs data"),
        ([[1, 2]], "a list"),
        (torch.zeros(0, 3).long(), "shape"),
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


def test_a_module_alone_is_no_target(data):
    with pytest.raises(spdcli.UsageError, match="target= is a Gated"):
        spdcli.decompose(OWN, target=Gated(), data=data)
    with pytest.raises(spdcli.UsageError, match="no target="):
        spdcli.decompose("induction-quick", data=data)
