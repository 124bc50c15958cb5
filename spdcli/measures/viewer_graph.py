"""A graph of slices in the JSON that the graph viewers of Neuronpedia and circuit-tracer read.

Those know features of transcoders by a layer and a number; here the layer is a slice's block, and the number counts the
slices of all of the block's matrices, in the order of execution. `feature_type` is theirs, which decides how a node is
drawn; `clerp`, the label, has the slice's address. `influence` is `GraphNode.influence`, by which viewers prune.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spdcli.measures.slice_graph import GraphNode, SliceGraph

FEATURE = "cross layer transcoder"
PINNED = 10  # nodes that stand in the subgraph when a viewer opens it


def viewer_graph(
    graph: SliceGraph, slices: Mapping[str, int], blocks: Mapping[str, int], slug: str, scan: str, version: str
) -> dict[str, Any]:
    """The graph as an object of JSON, called `slug`, of the model that viewers call `scan`.

    `slices[m]` is how many slices matrix m has and `blocks[m]` its block, in the order of execution.
    """
    firsts: dict[str, int] = {}
    used: dict[int, int] = {}
    for name, count in slices.items():
        firsts[name] = used.get(blocks[name], 0)
        used[blocks[name]] = firsts[name] + count
    nodes = [_node(node, firsts, graph.blocks) for node in graph.nodes]
    ids = [node["node_id"] for node in nodes]
    logits = [node["node_id"] for node in nodes if node["feature_type"] == "logit"]
    for node in nodes:
        node["is_target_logit"] = node["node_id"] in logits[:1]
    features = [node["node_id"] for node in nodes if node["feature_type"] == FEATURE]
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": list(graph.tokens),
            "prompt": graph.prompt,
            "schema_version": 1,
            "info": {
                "description": "Slices of weights (SPD); a link is the direct effect m ∂a/∂m of a slice's mask m on "
                "another's inner activation a, or on a logit, in the model made of active slices.",
                "generator": {"name": "spd", "version": version},
            },
        },
        "qParams": {
            "pinnedIds": [*logits[:1], *features[:PINNED]],
            "supernodes": [],
            "linkType": "both",
            "clickedId": logits[0] if logits else "",
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": [
            {"source": ids[link.source], "target": ids[link.target], "weight": link.weight} for link in graph.links
        ],
    }


def _node(node: GraphNode, firsts: Mapping[str, int], blocks: int) -> dict[str, Any]:
    common = {
        "ctx_idx": node.position,
        "token_prob": node.probability,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "influence": node.influence,
        "activation": node.activation,
    }
    if node.kind == "slice":
        number = firsts[node.matrix or ""] + (node.index or 0)
        layer, kind, feature = str(node.block), FEATURE, paired(node.block or 0, number)
        identity, script, label = f"{layer}_{number}_{node.position}", f"{layer}_{number}-0", node.label
    elif node.kind == "embedding":
        layer, kind, feature = "E", "embedding", node.position
        identity, script = f"E_{node.token}_{node.position}", f"E_{node.token}-{node.position}"
        label = f'Emb: "{node.label}"'
    else:
        layer, kind, feature = str(blocks + 1), "logit", node.token or 0
        identity, script = f"{layer}_{node.token}_{node.position}", f"L_{node.token}-{node.position}"
        label = f'Output "{node.label}" (p={node.probability:.3f})'
    own = {"node_id": identity, "jsNodeId": script, "layer": layer, "feature": feature, "feature_type": kind}
    return {**own, "clerp": label, **common}


def paired(layer: int, number: int) -> int:
    """One number for a layer and a feature's number in it, as the viewers make it (Cantor's pairing).

    >>> paired(0, 0), paired(1, 0), paired(0, 1), paired(2, 0)
    (0, 1, 2, 3)
    """
    return (layer + number) * (layer + number + 1) // 2 + number
