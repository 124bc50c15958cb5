"""Broad text: sampled from a model, seeded; second moments against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from small_runs import model_recipe
from twins import close, language_subject, matrix_inputs, toy_subject

from spdcli.engine.forward import clean_pass
from spdcli.engine.target import Batch
from spdcli.errors import SpdError
from spdcli.runs import subject as subjects
from spdcli.targets.broad_text import generated_text, require_length, ridged, sampled, second_moments
from spdcli.targets.huggingface import load_model


def drawn(model, count=70, length=5, seed=1):
    return generated_text(model.model, model.tokenizer, count, 3, length, seed)


def test_sampled_text_is_seeded(tiny_llama_dir):
    model = load_model(str(tiny_llama_dir), "float32")
    everything = torch.arange(70)
    first, again, other = (drawn(model, seed=seed).training.read(everything) for seed in (1, 1, 2))
    assert first.shape == (70, 5)  # more than are sampled together
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    held_out = drawn(model).held_out
    assert len(held_out) == 3
    assert not (held_out.read(torch.arange(3))[:, None] == first).all(-1).any()


def test_a_sampled_token_is_as_likely_as_the_model_says(tiny_llama_dir):
    """The second token after one first token, against the model's own next-token distribution."""
    model = load_model(str(tiny_llama_dir), "float32")
    count = 6000
    tokens = sampled(model.model, [0, 1, 10**6], count, 2, torch.Generator().manual_seed(0))
    assert not torch.isin(tokens, torch.tensor([0, 1])).any()  # special tokens are no text
    first = tokens[:, 0].bincount()
    assert first.max() < 2 * count / (first.count_nonzero())  # uniform, within three standard deviations and more
    begin = int(first.argmax())
    logits = model.model(torch.tensor([[begin]])).logits[0, -1]
    logits[[0, 1]] = float("-inf")
    # Over all first tokens: the mean log-likelihood of what was drawn is minus the entropy, give or take the noise.
    log_p = model.model(tokens[:, :1]).logits[:, -1]
    log_p[:, [0, 1]] = float("-inf")
    log_p = log_p.log_softmax(-1)
    found = log_p.gather(1, tokens[:, 1:])[:, 0]
    entropy = -(log_p.exp() * log_p.nan_to_num(neginf=0.0)).sum(-1)
    error = (found + entropy).std() / count**0.5
    assert abs(found.mean() + entropy.mean()) < 4 * error


def test_kept_text_is_sampled_once_for_a_model(tiny_llama_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = load_model(str(tiny_llama_dir), "float32")
    read = lambda: generated_text(model.model, model.tokenizer, 4, 2, 5, 1, kept=True).training.read(torch.arange(4))  # noqa: E731
    first = read()
    assert first.shape == (4, 5)
    monkeypatch.setattr("spdcli.targets.broad_text.sampled", None)
    assert torch.equal(first, read())
    with torch.no_grad():
        model.model.get_input_embeddings().weight[0] += 1
    with pytest.raises(TypeError):  # another model's text is another
        read()


def test_sequences_longer_than_the_model_are_refused(tiny_llama_dir):
    with pytest.raises(SpdError, match="the model takes 64 tokens"):
        require_length(65, load_model(str(tiny_llama_dir), "float32").tokenizer)


@pytest.mark.parametrize("which", ["gpt2 split", "llama", "toy"])
def test_second_moments_are_means_over_real_positions(which, request):
    if which == "toy":
        subject, names = toy_subject(sequences=70), ["Q0", "V1"]
    elif which == "llama":
        subject = language_subject(request.getfixturevalue("tiny_llama_dir"))
        names = ["layers.0.mlp.up_proj", "layers.0.mlp.gate_proj", "layers.1.self_attn.o_proj"]
    else:
        subject = language_subject(request.getfixturevalue("tiny_gpt2_dir"), split_attention=True)
        names = ["h.1.attn.c_attn.k", "h.0.mlp.c_proj", "h.2.mlp.c_proj"]
    found = second_moments(subject.target, subject.batch, names)
    expected = dict.fromkeys(names, 0)
    for tokens, valid in zip(subject.batch.tokens, subject.batch.valid, strict=True):
        inputs, _ = matrix_inputs(subject, tokens[valid][None], names)
        for name in names:
            for x in inputs[name][0]:
                expected[name] = expected[name] + torch.outer(x, x) / int(subject.batch.valid.sum())
    for name in names:
        assert found[name].dtype == torch.float64
        close(found[name], expected[name])


def test_blocks_after_the_last_wanted_matrix_are_not_run(tiny_llama_dir):
    subject = language_subject(tiny_llama_dir)
    ran = []
    for number, block in enumerate(subject.target.blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: ran.append(number))
    clean_pass(subject.target, subject.batch, ["layers.1.mlp.up_proj"], outputs=False)
    assert ran == [0, 1, 2]  # the third is entered and left at once
    seen = []
    subject.target.blocks[2].mlp.register_forward_pre_hook(lambda module, args: seen.append(module))
    clean_pass(subject.target, subject.batch, ["layers.1.mlp.up_proj"], outputs=False)
    assert not seen
    subject.target.run(subject.batch.tokens)
    assert seen  # no hook was left behind


def test_a_ridge_is_a_share_of_the_mean_eigenvalue():
    moment = torch.diag(torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64))
    close(torch.linalg.eigvalsh(ridged(moment, 0.5)), torch.tensor([2.5, 3.5, 7.5], dtype=torch.float64))


def test_the_stream_of_a_recipe(tiny_gpt2_dir, tmp_path):
    recipe = model_recipe(
        tiny_gpt2_dir, "data.stream=generated", "data.stream_sequences=3", "data.stream_length=4", folder=tmp_path
    )
    subject = subjects.language_subject(recipe, torch.device("cpu"))
    stream = subject.stream()
    assert isinstance(stream, Batch)
    assert stream.tokens.shape == (3, 4)
    assert subject.stream() is stream  # drawn once
    plain = subjects.language_subject(model_recipe(tiny_gpt2_dir, folder=tmp_path), torch.device("cpu"))
    assert plain.stream is None
