"""Labels of slices against planted directions."""

from __future__ import annotations

import pytest
import torch
from conftest import save_tiny_model
from torch import nn

from spdcli.engine.target import Target
from spdcli.measures.labels import TokenLens
from spdcli.targets.huggingface import build_target, load_model
from spdcli.targets.language_routes import build_routes
from spdcli.targets.routes import Route, narrow_heads, through, unchanged, widen_heads

TOKENS = torch.tensor([[5, 9, 2, 30]])


@pytest.fixture(scope="module", params=["gpt2", "gpt2-split", "llama", "qwen2"])
def lens(request, tmp_path_factory):
    model_type = request.param.removesuffix("-split")
    folder = save_tiny_model(tmp_path_factory.mktemp(request.param), model_type)
    language_model = load_model(str(folder), "float64")
    split = request.param.endswith("-split")
    return TokenLens(build_target(language_model, split), build_routes(language_model, split), str)


def output_change(lens, name, onward, direction):
    """What module `onward` of the same block writes more, once `name`'s output moves by `direction`."""
    matrix = lens.target.matrices[name]
    written = []

    def move(module, args, output):
        moved = output.clone()
        moved[..., matrix.columns[0] : matrix.columns[1]] += direction
        return moved

    handle = (
        lens.target.blocks[matrix.block]
        .get_submodule(onward)
        .register_forward_hook(
            lambda module, args, output: written.append(output[0] if isinstance(output, tuple) else output)
        )
    )
    lens.target.run(TOKENS)
    mover = matrix.module.register_forward_hook(move)
    lens.target.run(TOKENS)
    handle.remove()
    mover.remove()
    return written[1] - written[0]


def final_logits_of(lens, stream):
    """The final norm's linear part and the unembedding, written out."""
    norm = lens.target.finish
    centred = stream - stream.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else stream
    return centred * norm.weight @ lens.target.unembedding.T


def names(scores, top):
    return [[str(token) for token in row] for row in scores.topk(top).indices.tolist()]


def test_values_promote_what_attention_writes(lens):
    """Attention's weights sum to one, so a value moved alike at all positions is written exactly."""
    name = next(
        n for n in lens.target.matrices if n.endswith((".1.attn.c_attn.v", ".1.attn.c_attn", ".1.self_attn.v_proj"))
    )
    matrix = lens.target.matrices[name]
    V = torch.randn(3, matrix.d_out, dtype=torch.float64)
    if name.endswith("c_attn"):
        V[:, : 2 * matrix.d_out // 3] = 0  # queries and keys change where attention looks
    onward = "attn" if ".attn." in name else "self_attn"
    changes = torch.stack([output_change(lens, name, onward, direction)[0, -1] for direction in V])
    assert lens.promotes(name, V, 6) == names(final_logits_of(lens, changes), 6)
    torch.testing.assert_close(
        lens.routes[name].out(V) @ lens.target.unembedding.T, final_logits_of(lens, changes), rtol=1e-5, atol=1e-5
    )


def test_a_fused_matrix_promotes_by_its_values_alone(tiny_gpt2_dir):
    language_model = load_model(str(tiny_gpt2_dir), "float32")
    lens = TokenLens(build_target(language_model, False), build_routes(language_model, False), str)
    V = torch.randn(2, 96)
    other = V.clone()
    other[:, :64] = torch.randn(2, 64)
    assert lens.promotes("h.0.attn.c_attn", V, 5) == lens.promotes("h.0.attn.c_attn", other, 5)


def test_matrices_that_write_the_stream(lens):
    for name in lens.target.matrices:
        if name.endswith(("c_proj", "o_proj", "down_proj")):
            V = torch.randn(2, 32, dtype=torch.float64)
            assert lens.promotes(name, V, 5) == names(final_logits_of(lens, V), 5)


def test_hidden_units_promote_through_the_next_matrix(lens):
    for name, matrix in lens.target.matrices.items():
        if name.endswith(("c_fc", "up_proj", "gate_proj")):
            behind = lens.target.matrices[name.rsplit(".", 1)[0] + (".c_proj" if "c_fc" in name else ".down_proj")]
            V = torch.eye(matrix.d_out, dtype=torch.float64)[:2]
            assert lens.promotes(name, V, 5) == names(final_logits_of(lens, behind.weight[:2]), 5)


def test_queries_and_keys_promote_nothing(lens):
    steering = [name for name in lens.target.matrices if name.endswith(("q_proj", "k_proj", ".q", ".k"))]
    for name in steering:
        assert lens.promotes(name, torch.randn(2, lens.target.matrices[name].d_out), 5) == [[], []]


def test_reads_is_what_the_matrix_would_see_of_an_embedding_alone(lens):
    for name, matrix in lens.target.matrices.items():
        if name.endswith(("q_proj", "v_proj", "c_attn", ".q", "c_fc", "up_proj", "gate_proj")):
            block = lens.target.blocks[matrix.block]
            norms = {"attn": "ln_1", "self_attn": "input_layernorm"} if "attn" in name else {}
            norm = norms.get(name.split(".")[2], "ln_2" if ".mlp.c_fc" in name else "post_attention_layernorm")
            U = torch.randn(matrix.d_in, 2, dtype=torch.float64)
            scores = block.get_submodule(norm)(lens.target.embedding) @ U
            assert lens.reads(name, U, 5) == names(scores.T, 5)


def test_reads_through_the_matrix_before(lens):
    """An attention output reads shared value heads as each of its query heads repeats them."""
    for name, matrix in lens.target.matrices.items():
        if not name.endswith("o_proj"):
            continue
        values = lens.target.matrices[name.replace("o_proj", "v_proj")]
        seen = lens.target.blocks[matrix.block].input_layernorm(lens.target.embedding) @ values.weight
        repeated = seen.view(-1, 2, 1, 8).expand(-1, 2, 2, 8).reshape(-1, 32)
        U = torch.randn(32, 2, dtype=torch.float64)
        assert lens.reads(name, U, 5) == names((repeated @ U).T, 5)
    for name, matrix in lens.target.matrices.items():
        if name.endswith("mlp.c_proj"):
            before = lens.target.matrices[name.replace("c_proj", "c_fc")]
            seen = lens.target.blocks[matrix.block].ln_2(lens.target.embedding) @ before.weight
            U = torch.randn(matrix.d_in, 2, dtype=torch.float64)
            assert lens.reads(name, U, 5) == names((seen @ U).T, 5)


def test_signs_turn_the_direction(lens):
    name = next(name for name in lens.target.matrices if name.endswith(("up_proj", "c_fc")))
    matrix = lens.target.matrices[name]
    V, U = torch.randn(2, matrix.d_out), torch.randn(matrix.d_in, 2)
    signs = torch.tensor([1, -1])
    assert lens.promotes(name, V, 3, signs) == lens.promotes(name, V * signs[:, None], 3)
    assert lens.reads(name, U, 3, signs) == lens.reads(name, U * signs, 3)
    assert lens.reads(name, U, 3, signs)[1] != lens.reads(name, U, 3)[1]


def test_widening_and_narrowing_heads_are_adjoint():
    x, y = torch.randn(3, 4), torch.randn(12, 5)  # 2 value heads of width 2, shared by 6 query heads
    assert widen_heads(torch.tensor([[1.0, 2, 3, 4]]), 8, 2).tolist() == [[1, 2, 1, 2, 3, 4, 3, 4]]
    torch.testing.assert_close(widen_heads(x, 12, 2) @ y, x @ narrow_heads(y, 4, 2))


def test_a_target_of_another_kind():
    """A stream without norms, as the toy's: three tokens along the axes, an output matrix that swaps two."""
    eye = torch.eye(3)
    target = Target(nn.Identity(), [], lambda tokens, valid: None, nn.Identity(), eye, None, eye, {})
    swap = eye[[1, 0, 2]]
    routes = {
        "V0": Route(),
        "Q0": Route(out=None),
        "K0": Route(into=None),
        "V1": Route(out=through(swap, unchanged, 3)),
    }
    lens = TokenLens(target, routes, "abc".__getitem__)
    direction = torch.tensor([[0.9, 0.5, 0.1]])
    assert lens.promotes("V0", direction, 2) == [["a", "b"]]
    assert lens.promotes("V1", direction, 2) == [["b", "a"]]
    assert lens.promotes("Q0", direction, 2) == [[]]
    assert lens.reads("Q0", direction.T, 9) == [["a", "b", "c"]]
    assert lens.reads("Q0", direction.T, 1, torch.tensor([-1])) == [["c"]]
    assert lens.reads("K0", direction.T, 1) == [[]]


def test_labels_of_smollm2_are_words(smollm2):
    lens = TokenLens(build_target(smollm2, False), build_routes(smollm2, False), smollm2.token_text)
    token = smollm2.tokenizer(" Bryant", add_special_tokens=False)["input_ids"][0]
    seen = smollm2.blocks[0].post_attention_layernorm(lens.target.embedding[token])
    assert lens.reads("layers.0.mlp.up_proj", seen[:, None], 3)[0][0] == " Bryant"
