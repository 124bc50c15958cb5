"""Other people's tools on the model that `suppress` returns: PyTorch's hooks, nnsight, TransformerLens."""

from __future__ import annotations

import importlib.util

import pytest
import torch

SLICES = ["h.1.mlp.c_fc:0", "h.1.mlp.c_fc:1"]
TEXT = "Kobe Bryant plays"


def installed(package):
    """A test that is skipped where a package is missing: they are of the extra `interop`."""
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def edited(language_run):
    return language_run.suppress(SLICES).eval()


@pytest.fixture(scope="module")
def tokens(language_run):
    return language_run.tokens(TEXT)[None]


@pytest.fixture(scope="module")
def seen(edited, tokens):
    """What a hook sees the edited matrix read and give, and the model's logits."""
    caught = []
    handle = edited.transformer.h[1].mlp.c_fc.register_forward_hook(
        lambda module, args, out: caught.append((args[0], out))
    )
    try:
        with torch.no_grad():
            logits = edited(tokens).logits
    finally:
        handle.remove()
    ((x, out),) = caught
    return x, out, logits


@torch.no_grad()
def test_hooks_see_the_edited_weights(language_run, edited, tokens, seen):
    x, out, logits = seen
    module = edited.transformer.h[1].mlp.c_fc
    original = language_run.model.transformer.h[1].mlp.c_fc.weight
    torch.testing.assert_close(out, x @ module.weight + module.bias)
    assert not torch.allclose(module.weight, original)
    assert not torch.allclose(language_run.model(tokens).logits, logits)


@torch.no_grad()
def test_a_hook_can_put_the_edit_back(language_run, edited, tokens):
    """The original matrix's output in the place of the edited one's makes the original model."""
    original = language_run.model.transformer.h[1].mlp.c_fc
    patch = lambda module, args, out: args[0] @ original.weight + original.bias  # noqa: E731
    handle = edited.transformer.h[1].mlp.c_fc.register_forward_hook(patch)
    try:
        torch.testing.assert_close(edited(tokens).logits, language_run.model(tokens).logits)
    finally:
        handle.remove()


@installed("nnsight")
def test_nnsight_traces_it(language_run, edited, tokens, seen):
    from nnsight import NNsight

    wrapped = NNsight(edited)
    with wrapped.trace(tokens):
        out = wrapped.transformer.h[1].mlp.c_fc.output.save()
        logits = wrapped.output.logits.save()
    torch.testing.assert_close(out, seen[1])
    torch.testing.assert_close(logits, seen[2])


@installed("transformer_lens")
@torch.no_grad()
def test_transformer_lens_runs_it_with_a_cache(language_run, edited, tokens, seen, tiny_gpt2_dir):
    import copy

    from transformer_lens.model_bridge import TransformerBridge

    own = copy.deepcopy(edited)  # it changes the modules that it is given
    bridge = TransformerBridge.boot_transformers(
        str(tiny_gpt2_dir), hf_model=own, tokenizer=language_run.tokenizer, device="cpu"
    )
    logits, cache = bridge.run_with_cache(tokens)
    torch.testing.assert_close(logits, seen[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cache["blocks.1.mlp.hook_pre"], seen[1], rtol=1e-4, atol=1e-4)
