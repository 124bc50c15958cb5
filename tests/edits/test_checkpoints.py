"""An edited model in memory: to the bit what is written, and the run's own target is left alone."""

from __future__ import annotations

import pytest
import torch
from edited_models import ask_own, open_case
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spdcli.edits.answer_changes import measure_edits
from spdcli.edits.checkpoints import edited_model, save_checkpoint
from spdcli.edits.patches import edited_weights
from spdcli.edits.suppression import Address, suppression


@pytest.mark.parametrize("case", ["gpt2", "split", "llama", "toy"])
def test_an_edited_model_is_what_a_checkpoint_holds(case, request, tmp_path):
    subject, decomposition, names, tolerance = open_case(case, request, tmp_path)
    slices = [Address(names[0], 0), Address(names[0], 3), Address(names[1], 2)]
    edit = suppression(subject.target, decomposition, slices)
    before = {name: value.clone() for name, value in subject.target.model.state_dict().items()}
    edited = edited_model(subject, edit)
    assert edited is not subject.target.model
    assert all(torch.equal(value, before[name]) for name, value in subject.target.model.state_dict().items())
    save_checkpoint(tmp_path / "saved", subject, edited_weights(subject.target, edit), {})
    if case == "toy":
        written = load_file(tmp_path / "saved" / "target.safetensors")
    else:
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64).state_dict()
    own = edited.state_dict()
    assert all(torch.equal(own[name], value) for name, value in written.items())
    assert any(not torch.equal(own[name], before[name]) for name in own)

    questions = ask_own(subject)
    effects = measure_edits(subject.target, questions, {"": edit})[""]
    batch = questions.batch
    for row, effect in enumerate(effects):
        tokens = batch.tokens[row][batch.valid[row]][None]
        logits = edited.logits(tokens) if case == "toy" else edited(tokens).logits[:, -1]
        p = logits[0].softmax(-1)[batch.answers[row]].item()
        assert effect.after == pytest.approx(p, **tolerance)


def test_a_copy_shares_no_weight(request, tmp_path):
    subject, decomposition, names, _ = open_case("gpt2", request, tmp_path)
    edited = edited_model(subject, suppression(subject.target, decomposition, [Address(names[0], 0)]))
    before = subject.target.matrices[names[0]].weight.clone()
    with torch.no_grad():
        for parameter in edited.parameters():
            parameter.zero_()
    assert torch.equal(subject.target.matrices[names[0]].weight, before)
