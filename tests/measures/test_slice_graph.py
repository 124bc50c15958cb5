"""Graphs of slices: links against finite differences, effects against the sum over all paths, and the viewers' JSON."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch
from edited_models import open_case
from small_runs import MODEL, one_line, spd_here

from spdcli.measures.slice_graph import (
    MaskedModel,
    direct_links,
    graph_text,
    labelled,
    likeliest,
    most_effective,
    slice_graph,
    total_effects,
)
from spdcli.measures.viewer_graph import paired, viewer_graph

STRING, NUMBER, INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
# What Neuronpedia and circuit-tracer expect, in our own words.
SCHEMA = {
    "type": "object",
    "required": ["metadata", "qParams", "nodes", "links"],
    "properties": {
        "metadata": {
            "type": "object",
            "required": ["slug", "scan", "prompt_tokens", "prompt", "transcoder_list"],
            "properties": {
                "slug": STRING,
                "scan": STRING,
                "prompt": STRING,
                "prompt_tokens": {"type": "array", "items": STRING},
                "transcoder_list": {"type": "array", "items": STRING},
                "schema_version": {"const": 1},
                "info": {"type": "object"},
            },
        },
        "qParams": {
            "type": "object",
            "required": ["pinnedIds", "supernodes", "linkType", "clickedId", "sg_pos"],
            "properties": {
                "pinnedIds": {"type": "array", "items": STRING},
                "supernodes": {"type": "array"},
                "linkType": {"enum": ["both", "input", "output"]},
                "clickedId": STRING,
                "sg_pos": STRING,
            },
        },
        "nodes": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["node_id", "feature", "layer", "ctx_idx", "feature_type", "jsNodeId", "clerp"],
                "properties": {
                    "node_id": {"type": "string", "pattern": r"^(E|\d+)_\d+_\d+$"},
                    "feature": INTEGER,
                    "layer": {"type": "string", "pattern": r"^(E|\d+)$"},
                    "ctx_idx": INTEGER,
                    "feature_type": {"enum": ["cross layer transcoder", "embedding", "logit"]},
                    "token_prob": NUMBER,
                    "is_target_logit": {"type": "boolean"},
                    "run_idx": INTEGER,
                    "reverse_ctx_idx": INTEGER,
                    "jsNodeId": STRING,
                    "clerp": STRING,
                    "influence": {"type": ["number", "null"], "minimum": 0, "maximum": 1.0001},
                    "activation": {"type": ["number", "null"]},
                },
            },
        },
        "links": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["source", "target", "weight"],
                "properties": {"source": STRING, "target": STRING, "weight": NUMBER},
            },
        },
    },
}
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}


def mistakes(value, schema, place="$"):
    """What of `value` a JSON schema does not allow: as much of the language as SCHEMA uses."""
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [value is None if kind == "null" else isinstance(value, TYPES[kind]) for kind in kinds]
    if kinds and (not any(fits) or (isinstance(value, bool) and "boolean" not in kinds)):
        return [f"{place}: {value!r} is no {kinds}"]
    if ("const" in schema and value != schema["const"]) or ("enum" in schema and value not in schema["enum"]):
        return [f"{place}: {value!r}"]
    if value is not None and not schema.get("minimum", float("-inf")) <= (value if "minimum" in schema else 0):
        return [f"{place}: {value!r} is too small"]
    if value is not None and "maximum" in schema and value > schema["maximum"]:
        return [f"{place}: {value!r} is too large"]
    if "pattern" in schema and not re.match(schema["pattern"], value):
        return [f"{place}: {value!r} is not like {schema['pattern']}"]
    said = [f"{place}.{key} is missing" for key in schema.get("required", []) if key not in value]
    for key, own in schema.get("properties", {}).items():
        said += mistakes(value[key], own, f"{place}.{key}") if key in value else []
    for number, item in enumerate(value if "items" in schema else []):
        said += mistakes(item, schema["items"], f"{place}[{number}]")
    return said


@pytest.fixture(params=["gpt2", "toy"])
def model(request, tmp_path):
    """A masked model of few slices, with masks between 0 and 1, in float64."""
    subject, decomposition, names, _ = open_case(request.param, request, tmp_path, "slices.C=3")
    texts, row = graph_text(subject, 1, False, 0)
    tokens = texts.batch.tokens[row : row + 1, :4]
    torch.manual_seed(1)
    g = {name: torch.rand(1, 4, 3, dtype=torch.float64) * (torch.rand(1, 4, 3) < 0.6) for name in names}
    return subject, MaskedModel(subject.target, decomposition, g, tokens)


def graph_nodes(subject, model, threshold=0.0, top=10**6, logits=2):
    chosen = likeliest(model, logits)
    return [*labelled(subject, model.decomposition, most_effective(model, chosen, threshold, top)), *chosen]


def value_of(model, node, g):
    """A node's number in the model with masks g."""
    run = MaskedModel(model.target, model.decomposition, g, model.tokens).run(1, False)
    return (
        run.logits[0, node.token] if node.kind == "logit" else run.inner[node.matrix][0, node.position, node.index]
    ).item()


def test_effects_are_finite_differences(model):
    subject, model = model
    nodes = graph_nodes(subject, model)
    logits = [node for node in nodes if node.kind == "logit"]
    effects = total_effects(model, [node.token for node in logits])
    for node in [node for node in nodes if node.kind == "slice"][:6]:
        for row, logit in enumerate(logits):
            sides = []
            for step in (1e-5, -1e-5):
                g = {name: values.clone() for name, values in model.g.items()}
                g[node.matrix][0, node.position, node.index] *= 1 + step
                sides.append(value_of(model, logit, g))
            slope = (sides[0] - sides[1]) / 2e-5
            found = effects[node.matrix][row, node.position, node.index].item()
            assert found == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_effects_are_sums_over_paths(model):
    """(I - D)⁻¹ over all slices, D the direct derivatives by activations, gives what autograd gives at once."""
    subject, model = model
    nodes = graph_nodes(subject, model)
    size = len(nodes)
    direct = torch.zeros(size, size, dtype=torch.float64)  # [target, source]
    for link in direct_links(model, nodes, lambda progress: None):
        direct[link.target, link.source] = link.weight / nodes[link.source].activation
    total = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - direct)
    logits = [(number, node) for number, node in enumerate(nodes) if node.kind == "logit"]
    effects = total_effects(model, [node.token for _, node in logits])
    assert (direct.count_nonzero(1) > 0).sum() > len(logits), "some links are between slices"
    for (row, (target, _)), (source, node) in itertools.product(enumerate(logits), enumerate(nodes)):
        if node.kind == "slice":
            whole = total[target, source].item() * node.activation
            assert whole == pytest.approx(
                effects[node.matrix][row, node.position, node.index].item(), rel=1e-6, abs=1e-9
            )


def test_rows_are_many_targets_at_once(model, monkeypatch):
    subject, model = model
    nodes = graph_nodes(subject, model)
    whole = {(link.source, link.target): link.weight for link in direct_links(model, nodes, lambda progress: None)}
    monkeypatch.setattr("spdcli.measures.slice_graph.ROW_TOKENS", 4)  # a row a pass
    single = {(link.source, link.target): link.weight for link in direct_links(model, nodes, lambda progress: None)}
    assert set(single) >= set(whole)
    for key, weight in single.items():
        assert whole.get(key, 0.0) == pytest.approx(weight, rel=1e-9, abs=1e-12)


def test_the_slices_of_most_effect_come_first(model):
    subject, model = model
    nodes = [node for node in graph_nodes(subject, model) if node.kind == "slice"]
    few = [node for node in graph_nodes(subject, model, top=3) if node.kind == "slice"]
    assert few == nodes[:3]
    shares = [node.influence for node in nodes]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    logits = likeliest(model, 2)
    effects = total_effects(model, [node.token for node in logits])
    sizes = [
        sum(
            logit.probability * abs(effects[node.matrix][row, node.position, node.index].item())
            for row, logit in enumerate(logits)
        )
        for node in nodes
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(bool((g > 0.5).sum()) for g in model.g.values())
    assert len(graph_nodes(subject, model, threshold=0.5)) - 2 == sum(int((g > 0.5).sum()) for g in model.g.values())


@pytest.mark.parametrize("case", ["gpt2", "toy"])
def test_the_viewers_json(case, request, tmp_path):
    subject, decomposition, names, _ = open_case(case, request, tmp_path)
    texts, row = graph_text(subject, 1, False, 0)
    graph = slice_graph(subject, decomposition, texts, row, top=7, logits=2)
    counts = {name: decomposition.of(name).U.shape[1] for name in names}
    blocks = {name: subject.target.matrices[name].block for name in names}
    data = json.loads(json.dumps(viewer_graph(graph, counts, blocks, "a-graph", "tiny", "1.0")))
    assert mistakes(data, SCHEMA) == []
    ids = [node["node_id"] for node in data["nodes"]]
    assert len(set(ids)) == len(ids) == len({node["jsNodeId"] + str(node["ctx_idx"]) for node in data["nodes"]})
    assert {link["source"] for link in data["links"]} | {link["target"] for link in data["links"]} <= set(ids)
    assert [node["is_target_logit"] for node in data["nodes"]].count(True) == 1
    assert data["qParams"]["clickedId"] in data["qParams"]["pinnedIds"]
    assert set(data["qParams"]["pinnedIds"]) <= set(ids)
    assert len(data["metadata"]["prompt_tokens"]) == sum(node["layer"] == "E" for node in data["nodes"])
    for node in data["nodes"]:
        if node["feature_type"] == "cross layer transcoder":
            layer, number, _ = map(int, node["node_id"].split("_"))
            assert node["feature"] == paired(layer, number)
            matrix, _, index = node["clerp"].split(" ")[0].rpartition(":")
            before = [counts[name] for name in names[: names.index(matrix)] if blocks[name] == layer]
            assert (blocks[matrix], number) == (layer, sum(before) + int(index))
    broken = {**data, "links": [{"source": 1}]}
    assert len(mistakes(broken, SCHEMA)) == 3


def test_the_command_writes_a_file(monkeypatch, capsys, tmp_path, tiny_gpt2_dir):
    spd = spd_here(monkeypatch, capsys)
    recipe, run, out = tmp_path / "model.toml", tmp_path / "run", tmp_path / "graph.json"
    recipe.write_text(MODEL.replace("MODEL", str(tiny_gpt2_dir)))
    assert spd("decompose", recipe, "--out", run, "--set", "slices.init='svd'")[0] == 0
    code, said, err = spd("graph", run, "--out", out, "--prompt", "the sport of golf", "--top", "5", "--json")
    assert code == 0, err
    told = json.loads(said)
    written = json.loads(out.read_text())
    assert mistakes(written, SCHEMA) == []
    assert told["nodes"] == len(written["nodes"]) == 5 + len(told["tokens"]) + 5
    assert told["links"] == len(written["links"]) > 0
    assert written["metadata"]["slug"] == "graph"
    code, _, err = spd("graph", run, "--out", out)
    assert code == 2
    one_line(err, "is there already")
    code, _, err = spd("graph", run, "--out", tmp_path / "other.json", "--prompt", "99")
    assert code == 2
    one_line(err, "prompt 99: expected one of the run's prompts")
