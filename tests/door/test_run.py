"""What a run says and does, against the commands on the same run and against weights by hand."""

from __future__ import annotations

import pytest
import torch
from door_checks import KOBE, equal, same_as
from small_runs import spd_here

import spdcli
from spdcli.engine.forward import clean_pass
from spdcli.engine.target import Batch
from spdcli.records import plain


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


FC = "h.1.mlp.c_fc"
SUBJECTS = ["Kobe Bryant", "Tiger Woods"]


def test_suppression_and_ablation_are_the_commands(saved_run, answer):
    two = [f"{FC}:0", f"{FC}:1"]
    options = ["--slice", two[0], "--slice", two[1]]
    same_as(answer("suppress", *options), saved_run.suppression(two))
    same_as(
        answer("suppress", *options, "--no-facts", "--together", "sequence", "--prompt", KOBE),
        saved_run.suppression(two, together="sequence", prompts=[KOBE], facts=None),
    )
    same_as(answer("ablate", *options, "--others", "sampled"), saved_run.ablate(two, others="sampled"))
    same_as(answer("ablate", "--mlp", "all", "--no-facts"), saved_run.ablate(mlps=["all"], facts=None))


def test_locate_trace_and_report_are_the_commands(saved_run, answer):
    named = [word for subject in SUBJECTS for word in ("--subject", subject)]
    for said, search in zip(answer("locate")["located"], saved_run.locate(), strict=True):
        same_as(said, search)
    same_as(answer("locate", "--prompt", "2", "--no-facts")["located"][0], saved_run.locate(2, facts=None)[0])
    for said, trace in zip(answer("trace", *named)["prompts"], saved_run.trace(SUBJECTS), strict=True):
        same_as(said, trace)
    same_as(answer("report", *named), saved_run.report(SUBJECTS))


def test_a_suppressed_model_is_a_model_with_the_projection_taken_out(language_run):
    matrix = language_run.subject.target.matrices[FC]
    before = matrix.weight.clone()
    U, V = (directions.double() for directions in language_run.slices(FC))
    u, v = U[:, 3] / U[:, 3].norm(), V[3] / V[3].norm()
    edited = language_run.suppress([f"{FC}:3"])
    assert type(edited) is type(language_run.model)
    wanted = before.double() - (u @ before.double() @ v) * torch.outer(u, v)
    torch.testing.assert_close(edited.get_submodule(f"transformer.{FC}").weight, wanted.float())
    assert torch.equal(matrix.weight, before)  # the target is as it was
    tokens = language_run.tokens(KOBE)[None]
    assert not torch.allclose(edited(tokens).logits, language_run.model(tokens).logits)


def test_a_run_in_memory_can_be_saved(toy_run, tmp_path, monkeypatch, capsys):
    with pytest.raises(spdcli.UsageError, match="in memory"):
        _ = toy_run.home
    toy_run.save(tmp_path / "run")
    assert equal(toy_run, spdcli.load(tmp_path / "run"))
    assert spd_here(monkeypatch, capsys)("eval", tmp_path / "run", "--sequences", "8", "-q")[0] == 0
    with pytest.raises(spdcli.UsageError, match="another run"):
        toy_run.save(tmp_path / "run")
    toy_run.save(tmp_path / "run", force=True)


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda run: run.suppress([f"{FC}:0"], together="at once"), "expected one of literal, orthonormal, sequence"),
        (lambda run: run.suppress([f"{FC}:77"]), "slices 0 to 5"),
        (lambda run: run.suppression(["nowhere:0"]), "nowhere"),
        (lambda run: run.ablate(), "nothing to ablate"),
        (lambda run: run.ablate([f"{FC}:0"], others="off"), "expected one of on, importance, sampled"),
        (lambda run: run.locate(9), "1 to 2"),
        (lambda run: run.trace(["Nobody"]), "no prompt has the subject"),
        (lambda run: run.inspect("nowhere"), "no prompt has the token"),
        (lambda run: run.inspect(prompts=KOBE), "is a text"),
        (lambda run: run.inspect(top=0), "at least 1"),
        (lambda run: run.evaluate(1), "at least 2"),
        (lambda run: run.svd(-1.0), "0 or more"),
        (lambda run: run.svd(sequences=0), "at least 1"),
        (lambda run: run.slices("h.1.mlp.c_fx"), "the nearest is 'h.1.mlp.c_fc'"),
        (lambda run: run.importances(torch.tensor([10**6])), "token ids from"),
        (lambda run: run.importances([-1]), "token ids from"),
        (lambda run: run.importances(torch.zeros(3)), "float"),
        (lambda run: run.importances(None), "no token ids"),
        (lambda run: run.importances([[1], [1, 2]]), "no token ids"),
    ],
)
def test_what_a_run_cannot_do_is_one_line(language_run, work, said):
    with pytest.raises(spdcli.UsageError, match=said):
        work(language_run)


def test_the_toy_has_no_facts_to_trace(toy_run):
    for work in (toy_run.trace, toy_run.report):
        with pytest.raises(spdcli.UsageError, match=r"toy|language model"):
            work()
    assert toy_run.suppression(["V0:0"]).facts is None
