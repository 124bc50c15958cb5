"""A decomposition of a tiny GPT-2 whose gates are set by hand, so that it is known which slices are active where."""

from __future__ import annotations

import torch
from small_runs import model_recipe
from transformers import AutoModelForCausalLM

from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject

CPU = torch.device("cpu")
FC, PROJ = "h.0.mlp.c_fc", "h.1.mlp.c_proj"
BRYANT, GOLF_OF = (0, 2), (1, 6)
EVERYWHERE = "everywhere"

# What is planted: (matrix, slice) -> importance before the clamp at 1, by (prompt, position).
PLANTED = {
    (FC, 0): {BRYANT: 0.75},
    (FC, 1): {BRYANT: 0.5, GOLF_OF: 0.25},  # both prompts: not unique
    (FC, 2): {GOLF_OF: 0.9},
    (FC, 3): EVERYWHERE,
    (PROJ, 1): {BRYANT: 2.0, (0, 4): 0.3},  # twice in one prompt: unique to it
    (PROJ, 4): {BRYANT: 3.0},
    (PROJ, 5): {(1, 0): 0.6},
}


def plant(decomposition, inputs, valid, name, index, wanted):
    """Sets one vector gate (ReLU, width 1) so that its slice is as important as `wanted` says, and 0 elsewhere.

    Solves for a direction whose product with each position's input is the wanted importance.
    """
    gate = decomposition.importances.gates[name.replace(".", "/")]
    places = [tuple(place) for place in valid.nonzero().tolist()]
    aim = torch.tensor([0.4 if wanted == EVERYWHERE else wanted.get(place, -1.0) for place in places])
    x = inputs[name][valid].double()
    direction = torch.linalg.lstsq(x, aim.double()[:, None], driver="gelsd").solution
    torch.testing.assert_close((x @ direction)[:, 0].float(), aim, rtol=1e-4, atol=1e-4)
    gate.w1[:, index] = direction[:, 0].float()
    gate.b1[index], gate.w2[:, index], gate.b2[index] = 0, 1, 0


def plant_gates(tiny_gpt2_dir, folder):
    """A subject and its decomposition with PLANTED, and every matrix's input `[B, T, I]` from a model of the test's."""
    settings = ["importance.gate_width=1", "importance.activation=relu", f'slices.matrices=["{FC}", "{PROJ}"]']
    recipe = model_recipe(tiny_gpt2_dir, *settings, folder=folder)
    subject = language_subject(recipe, CPU)
    decomposition = start_decomposition(recipe, subject, [FC, PROJ]).requires_grad_(False)
    model, inputs = AutoModelForCausalLM.from_pretrained(tiny_gpt2_dir).eval(), {}
    for name in (FC, PROJ):
        hook = lambda module, args, output, name=name: inputs.__setitem__(name, args[0])  # noqa: E731
        model.transformer.get_submodule(name).register_forward_hook(hook)
    batch = subject.prompts.batch
    with torch.no_grad():
        model(batch.tokens)
        for gate in decomposition.importances.gates.values():
            gate.w2.zero_()
            gate.b2.fill_(-0.5)
        for (name, index), wanted in PLANTED.items():
            plant(decomposition, inputs, batch.valid, name, index, wanted)
    return subject, decomposition, inputs
