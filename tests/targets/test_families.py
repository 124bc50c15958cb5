"""Every family of the table, small and odd, against transformers itself and weights that are edited by hand."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import save_tiny_model
from small_runs import model_recipe
from transformers import AutoModelForCausalLM

from spdcli.edits.answer_changes import measure_edits
from spdcli.edits.checkpoints import save_checkpoint
from spdcli.edits.patches import edited_weights
from spdcli.edits.prompts_and_answers import given_questions
from spdcli.edits.suppression import Address, Factors, suppression
from spdcli.engine.forward import clean_pass, masked_logits
from spdcli.engine.product import MaskedRows
from spdcli.engine.subcomponents import SliceSet, start_slices
from spdcli.engine.target import Batch, log_probabilities
from spdcli.errors import SpdError, UsageError
from spdcli.measures.labels import TokenLens
from spdcli.runs.decomposition import start_decomposition
from spdcli.runs.subject import language_subject
from spdcli.targets.architectures import ARCHITECTURES, UNFIT, architecture_of
from spdcli.targets.huggingface import build_target, load_model
from spdcli.targets.language_routes import build_routes
from spdcli.targets.prompts import begins_texts
from spdcli.targets.routes import final_scale

ROUNDED = 2e-6  # norms and eager attention of transformers round to float32, whatever the model's numbers
LENGTHS = (6, 3, 5)
PROMPTS = ["Kobe Bryant plays professional basketball", "the sport of golf"]
VOCABULARY = 331  # more than the tokenizer knows, and odd

# What makes a family odd, beside grouped heads, an untied head of an odd vocabulary, and biases that are not 0.
ODD = [
    ("gpt2", {}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
    ("mistral", {"sliding_window": 3}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1}),
    ("qwen3", {"head_dim": 12}),
    ("smollm3", {"no_rope_layer_interval": 2}),
    ("gpt_neox", {"tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    ("gpt_neo", {}),
    ("gptj", {}),
    ("opt", {"tie_word_embeddings": False}),
    ("bloom", {}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("falcon", {}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    ("falcon", {"multi_query": False, "parallel_attn": False, "alibi": True}),
    ("phi", {"qk_layernorm": True}),
    ("phi3", {"sliding_window": 3}),
    ("olmo", {"clip_qkv": 0.5}),
    ("olmo2", {"tie_word_embeddings": True}),
    ("stablelm", {"use_qkv_bias": True}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    ("starcoder2", {"sliding_window": 3, "use_bias": False}),
    ("gemma", {}),
    ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5, "sliding_window": 3}),
    ("gemma3_text", {"final_logit_softcapping": 3.0, "sliding_window": 3, "sliding_window_pattern": 2}),
    ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0}),
    ("cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
]


def test_no_family_is_left_out():
    assert {family for family, _ in ODD} == set(ARCHITECTURES)


@pytest.fixture(scope="module", params=ODD, ids=lambda odd: "-".join([odd[0], *odd[1]]))
def folder(request, tmp_path_factory):
    family, settings = request.param
    return save_tiny_model(tmp_path_factory.mktemp(family), family, **{"vocab_size": VOCABULARY} | settings)


@pytest.fixture(scope="module")
def language_model(folder):
    return load_model(str(folder), "float64")


@pytest.fixture(scope="module", params=[False, True], ids=["whole", "split"])
def target(request, language_model):
    if request.param and not any(entry.parts for entry in language_model.architecture.matrices):
        pytest.skip("nothing is fused")
    return build_target(language_model, request.param)


def padded_batch():
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(VOCABULARY, valid.shape, generator=torch.Generator().manual_seed(6))
    return Batch(torch.where(valid, tokens, 0), valid, valid)


@torch.no_grad()
def own_log_probs(model, batch):
    """The model's own, a sequence at a time, without padding, at all real positions."""
    each = [model(tokens[valid][None]).logits[0] for tokens, valid in zip(batch.tokens, batch.valid, strict=True)]
    return torch.cat(each).double().log_softmax(-1)


def random_slices(target, names):
    matrices = {name: target.matrices[name] for name in names}
    return SliceSet(start_slices(matrices, 3, "random", None, seed=1), delta=True).double()


def everywhere(mask):
    """A mask `[C]` on all sequences of the batch, beside the whole delta."""
    rows = len(LENGTHS)
    return MaskedRows(torch.arange(rows), mask.double().expand(rows, 1, -1), torch.ones(rows, 1, 1).double())


def masked(target, slices, batch, masks):
    with torch.no_grad():
        clean = clean_pass(target, batch, slices.names)
        logits = masked_logits(target, slices, clean, {name: everywhere(mask) for name, mask in masks.items()})
    return logits.log_softmax(-1)


def test_masks_of_one_are_the_target(language_model, target):
    batch = padded_batch()
    slices = random_slices(target, target.matrices)
    own = own_log_probs(language_model.model, batch)
    ours = masked(target, slices, batch, {name: torch.ones(3) for name in target.matrices})
    torch.testing.assert_close(clean_pass(target, batch, ()).log_probs, own, rtol=0, atol=ROUNDED)
    torch.testing.assert_close(ours, own, rtol=0, atol=ROUNDED)


def test_masks_are_weights_that_numpy_edits(language_model, target):
    """In a copy of the model, by the names of its modules: W - sum of (1 - m_c) U_c V_c."""
    batch, generator = padded_batch(), torch.Generator().manual_seed(2)
    slices = random_slices(target, target.matrices)
    masks = {name: torch.rand(3, generator=generator) for name in target.matrices}
    edited = copy.deepcopy(language_model.model)
    paths = {module: path for path, module in language_model.model.named_modules()}
    for name, matrix in target.matrices.items():
        U, V = (part.detach().numpy() for part in (slices.of(name).U, slices.of(name).V))
        stored = edited.get_parameter(f"{paths[matrix.module]}.weight")
        weight = (stored.T if matrix.transposed else stored).detach().numpy().copy()
        own = weight.reshape(len(weight), matrix.groups, -1)[:, :, slice(*matrix.columns)]
        lost = U * (1 - masks[name].double().numpy()) @ V
        own -= 0.2 * lost.reshape(own.shape)
        with torch.no_grad():
            stored.copy_(torch.from_numpy(weight.T if matrix.transposed else weight))
        masks[name] = 1 - 0.2 * (1 - masks[name])
    ours = masked(target, slices, batch, masks)
    wanted = own_log_probs(edited, batch)
    assert (wanted - own_log_probs(language_model.model, batch)).abs().max() > 0.1, "the edit does something"
    torch.testing.assert_close(ours, wanted, rtol=0, atol=20 * ROUNDED)


def test_parts_are_what_their_names_say(language_model):
    """Without v the matrix behind attention reads nothing. Without q at position 0 all is as before, since that
    position sees only itself; without k at position 0 the positions after it are not."""
    entry, blocks = language_model.architecture.matrices[0], language_model.architecture.blocks
    if not entry.parts:
        pytest.skip("nothing is fused")
    target = build_target(language_model, True)
    behind = target.matrices[f"{blocks}.0.{dict(entry.parts)['v']}"].module
    tokens = padded_batch().tokens[:1]

    @torch.no_grad()
    def read(part, position):
        """What `behind` reads when the part gives 0 at `position`."""
        matrix, seen = target.matrices[f"{blocks}.0.{entry.module}.{part}"], []

        def silence(module, args, output):
            own = matrix.covered(output).clone()
            own[:, position] = 0
            return matrix.with_covered(output, own)

        handles = [matrix.module.register_forward_hook(silence)]
        handles.append(behind.register_forward_pre_hook(lambda module, args: seen.append(args[0])))
        target.run(tokens)
        for handle in handles:
            handle.remove()
        return seen[0]

    everywhere, nowhere = slice(None), slice(0, 0)
    as_it_is = read("q", nowhere)
    assert as_it_is.abs().max() > 0
    assert read("v", everywhere).abs().max() == 0
    torch.testing.assert_close(read("q", 0), as_it_is, rtol=0, atol=ROUNDED)
    assert (read("k", 0) - as_it_is)[:, 1:].abs().max() > 1e-3
    assert (read("q", everywhere) - as_it_is)[:, 1:].abs().max() > 1e-3


@torch.no_grad()
def test_labels_go_through_every_norm(language_model):
    """Beside the derivative of the final norm along a direction without mean that is orthogonal to the stream; and
    every matrix has labels, but for those of queries and keys, which write nothing."""
    norm, generator = language_model.final_norm, torch.Generator().manual_seed(3)
    stream, direction = torch.randn(2, language_model.model.config.hidden_size, generator=generator).double()
    basis = torch.linalg.qr(torch.stack([torch.ones_like(stream), stream], dim=1)).Q
    direction -= basis @ (basis.t() @ direction)
    moved = (norm(stream + 0.05 * direction) - norm(stream - 0.05 * direction)) / 0.1
    ours = final_scale(norm)(direction[None])[0]
    torch.testing.assert_close(ours / ours.norm(), moved / moved.norm(), rtol=0, atol=2e-3)  # curvature
    centres = torch.allclose(norm(stream + 1), norm(stream), atol=1e-4)
    assert torch.allclose(final_scale(norm)(torch.ones(1, len(stream)).double()), torch.zeros(()).double()) == centres

    split = any(entry.parts for entry in language_model.architecture.matrices)
    for parted in {False, split}:
        lens = TokenLens(build_target(language_model, parted), build_routes(language_model, parted), str)
        for name, matrix in lens.target.matrices.items():
            U, V = torch.eye(matrix.d_in)[:, :1].double(), torch.eye(matrix.d_out)[-1:].double()
            steers = name.rpartition(".")[2] in ("q", "k", "q_proj", "k_proj")
            assert len(lens.reads(name, U, 2)[0]) == 2
            assert len(lens.promotes(name, V, 2)[0]) == (0 if steers else 2), name


def test_a_saved_edit_loads_as_what_was_measured(folder, language_model, tmp_path):
    """Of q alone where it is a part of a fused weight, and of the last matrix of an MLP."""
    split = any(entry.parts for entry in language_model.architecture.matrices)
    changes = ("target.dtype='float64'", f"target.split_attention={str(split).lower()}")
    subject = language_subject(model_recipe(folder, *changes, folder=tmp_path), torch.device("cpu"))
    names = list(subject.target.matrices)
    chosen = {name: subject.target.matrices[name] for name in (names[0], names[-1])}
    slices = SliceSet(start_slices(chosen, 3, "svd", None, 1), delta=True)
    edit = suppression(subject.target, slices, [Address(name, 0) for name in chosen])
    questions = given_questions(subject, PROMPTS)
    measured = measure_edits(subject.target, questions, {"edit": edit})["edit"]
    save_checkpoint(tmp_path / "saved", subject, edited_weights(subject.target, edit), {})

    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64).eval()
    batch = questions.batch
    for effect, tokens, valid, answer in zip(measured, batch.tokens, batch.valid, batch.answers, strict=True):
        with torch.no_grad():
            own = reloaded(tokens[valid][None]).logits[0, -1].softmax(-1)
        assert effect.after == pytest.approx(own[answer].item(), rel=1e-4)
    before, after = language_model.model.state_dict(), reloaded.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 2
    assert max(abs(effect.ratio - 1) for effect in measured) > 1e-3, "the edit does something"


@pytest.mark.parametrize("model_type", [model_type for types in UNFIT.values() for model_type in types])
def test_what_cannot_be_decomposed_says_why_in_a_line(model_type):
    with pytest.raises(SpdError, match=f"'{model_type}' cannot be decomposed: it") as caught:
        architecture_of(model_type)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gemma2"])
def test_a_bfloat16_target_is_itself_to_the_bit(family, tmp_path):
    """With all masks and deltas on, and with an edit of nothing: its own products are its own kernels'."""
    folder = save_tiny_model(tmp_path, family, vocab_size=VOCABULARY)
    recipe = model_recipe(folder, "target.dtype='bfloat16'", folder=tmp_path)
    subject = language_subject(recipe, torch.device("cpu"))
    target, batch = subject.target, padded_batch()
    decomposition = start_decomposition(recipe, subject, list(target.matrices))
    assert {parameter.dtype for parameter in decomposition.parameters()} <= {torch.float32, torch.bool}
    clean = clean_pass(target, batch, target.matrices)
    torch.testing.assert_close(clean.log_probs.exp().sum(-1), torch.ones(sum(LENGTHS)))
    rows, on = torch.arange(len(LENGTHS)), torch.ones(len(LENGTHS), 1, 6)
    whole = {name: MaskedRows(rows, on, on[:, :, :1]) for name in target.matrices}
    with torch.no_grad():
        masked = log_probabilities(masked_logits(target, decomposition, clean, whole))
    assert torch.equal(masked, clean.log_probs)

    name = next(iter(target.matrices))
    nothing = Factors(torch.zeros(target.matrices[name].d_in, 1), torch.zeros(1, target.matrices[name].d_out))
    (effect, other) = measure_edits(target, given_questions(subject, PROMPTS), {"nothing": {name: nothing}})["nothing"]
    assert (effect.before, effect.kl, other.ratio) == (effect.after, 0.0, 1.0)
    own = own_log_probs(target.model, Batch(*[tensor[:1] for tensor in (batch.tokens, batch.valid, batch.looked)]))
    torch.testing.assert_close(clean.log_probs[: LENGTHS[0]].double(), own, rtol=0, atol=0.05)  # 8 bits

    save_checkpoint(tmp_path / "saved", subject, edited_weights(target, {name: nothing}), {})
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.bfloat16}


def test_random_models_are_the_same_everywhere_and_gemmas_tokenizer_begins_texts():
    for name, begins in (("random:pythia", False), ("random:gemma", True)):
        language_model = load_model(name, "float32")
        build_target(language_model, False)
        assert begins_texts(language_model.tokenizer) is begins
        first = language_model.model.get_input_embeddings().weight[5, 7].item()
        shutil.rmtree(language_model.source)
        assert load_model(name, "float32").model.get_input_embeddings().weight[5, 7].item() == first
    with pytest.raises(UsageError, match="no model 'random:mamba'"):
        load_model("random:mamba", "float32")


WRONG = {
    "a scale is left out": ("granite", {"divisor": None}),
    "a cap is left out": ("gemma2", {"cap": None}),
    "another final norm": ("opt", {"final_norm": "layers.0.final_layer_norm"}),
    "heads are no sequences": ("bloom", {"by_head": frozenset()}),
    "matrices in another order": ("llama", {"matrices": ARCHITECTURES["llama"].matrices[::-1]}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_entry_is_refused(case, tmp_path, monkeypatch):
    family, change = WRONG[case]
    settings = dict(next(settings for name, settings in ODD if name == family))
    folder = save_tiny_model(tmp_path, family, **settings)
    monkeypatch.setitem(ARCHITECTURES, family, replace(ARCHITECTURES[family], **change))
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(SpdError, match=f"'{family}'") as caught:
            build_target(load_model(str(folder), dtype), False)
        assert "\n" not in caught.value.message


def test_embeddings_of_another_width_than_the_stream_are_refused(tmp_path):
    folder = save_tiny_model(tmp_path, "opt", word_embed_proj_dim=16)
    with pytest.raises(SpdError, match="embeddings have 16 numbers and its hidden states 32"):
        build_target(load_model(str(folder), "float32"), False)
