"""A prompt's active slices as a graph: what each does to the slices after it, and to the tokens that may follow.

Everything is of the model made of active slices alone (masks are the importances g of the target, without delta), in
which slice s at a position has the inner activation a_s = x . U_c and the mask m_s. Two exact derivatives:

    link s → r    m_s ∂a_r/∂m_s with the inner activations of all other slices held: the **direct** effect, through the
                  residual stream, norms, attention, activation functions and matrices that are not decomposed, but
                  through no other slice. To first order it is what a_r loses without s. Of a token's logit likewise,
                  the mean of all logits taken off; of an embedding e, what enters the first block: e . ∂a_r/∂e
    effect of s   m_s ∂logit/∂m_s through everything: the sum, over all paths from s to the logit, of the product of
                  their links divided by the activations of the slices in between

Effects say which slices are shown: those of the largest sum, over the tokens that may follow, of |effect| times
probability. B sequences (one), R rows, T positions, C slices of a matrix, D width of the stream, N vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from spdcli.engine.forward import outputs_after
from spdcli.engine.replacement import answering
from spdcli.engine.rows import hidden_of
from spdcli.engine.subcomponents import Decomposition
from spdcli.engine.target import Matrix, Target
from spdcli.errors import UsageError
from spdcli.measures.importances import importances_of
from spdcli.measures.labels import TokenLens
from spdcli.measures.texts import Texts, own_row, own_texts, user_texts
from spdcli.progress import Progress, Report, silent
from spdcli.runs.subject import Subject, require_tokens

ROW_TOKENS = 1024  # that one masked pass runs on: a row a target of links
LABELS = 3  # tokens that a slice's label names


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """A slice at a position, the `embedding` of a token, or a `logit` of one that may follow: `kind` says which.

    `block` is the number of the slice's block and `matrix` and `index` are its address; `token` is the id of the token
    of the other two. `activation` is a_s, `influence` the share of all slices' effects that the nodes up to this one
    have, in their order; `probability` is the logit's, in the model made of active slices.
    """

    kind: str
    position: int
    label: str
    block: int | None = None
    matrix: str | None = None
    index: int | None = None
    token: int | None = None
    activation: float | None = None
    importance: float | None = None
    influence: float | None = None
    probability: float = 0.0


@dataclass(frozen=True)
class GraphLink:
    """The direct effect of node number `source` on node number `target`."""

    source: int
    target: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class SliceGraph:
    """A prompt, its `tokens`, and the graph of its slices: of `active` slices (and positions) the ones of most effect.

    `blocks` is how many blocks the target has.
    """

    prompt: str
    tokens: Sequence[str]
    blocks: int
    active: int
    nodes: Sequence[GraphNode]
    links: Sequence[GraphLink]


def slice_graph(
    subject: Subject,
    decomposition: Decomposition,
    texts: Texts,
    row: int = 0,
    *,
    top: int = 100,
    logits: int = 5,
    threshold: float = 0.0,
    report: Report = silent,
) -> SliceGraph:
    """The graph of text `row` of `texts`: `top` slices, active above `threshold`, and the `logits` likeliest tokens.

    UsageError for a toy of sparse features, and for text in which no slice is active.
    """
    require_tokens(subject)
    target = subject.target
    batch = texts.batch.select(torch.tensor([row])).to(target.device)
    tokens = batch.tokens[:, : int(batch.valid.sum())]
    g = {
        name: values[:, : tokens.shape[1]] for name, values in importances_of(subject, decomposition, batch)[0].items()
    }
    if not any(bool((values > threshold).any()) for values in g.values()):
        raise UsageError(f"no slice is active in {texts.texts[row]!r}", "spd inspect shows where slices are active")
    model = MaskedModel(target, decomposition, g, tokens)
    chosen = likeliest(model, min(logits, target.unembedding.shape[0]))
    slices = most_effective(model, chosen, threshold, top)
    active = sum(int((values > threshold).sum()) for values in g.values())
    nodes = [
        *labelled(subject, decomposition, slices),
        *(
            GraphNode(kind="embedding", position=place, token=token, label=subject.token_text(token))
            for place, token in enumerate(tokens[0].tolist())
        ),
        *(replace(node, label=subject.token_text(node.token or 0)) for node in chosen),
    ]
    return SliceGraph(
        prompt=texts.texts[row],
        tokens=texts.pieces[row][: tokens.shape[1]],
        blocks=len(target.blocks),
        active=active,
        nodes=nodes,
        links=list(direct_links(model, nodes, report)),
    )


def graph_text(subject: Subject, prompt: int | str, begin_token: bool, seed: int) -> tuple[Texts, int]:
    """The text that `prompt` names, and its row: one of the run's own, by number from 1 or text, or another one."""
    require_tokens(subject)
    own = own_texts(subject, seed)
    row = own_row(own.texts, prompt)
    return (user_texts(subject, [str(prompt)], begin_token), 0) if row is None else (own, row)


@dataclass(frozen=True, eq=False)
class MaskedPass:
    """What one pass leaves: of every matrix the inner activations `inner` `[R, T, C]` and those that went on, `held`,
    the same unless they were held; `entry` `[R, T, D]` of the first block, and centred `logits` `[R, N]` at the end."""

    inner: Mapping[str, Tensor]
    held: Mapping[str, Tensor]
    entry: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class MaskedModel:
    """The model made of active slices on one text: masks `g[m]` `[1, T, C]`, `tokens` `[1, T]`."""

    target: Target
    decomposition: Decomposition
    g: Mapping[str, Tensor]
    tokens: Tensor

    def run(self, rows: int, hold: bool) -> MaskedPass:
        """`rows` equal rows. With `hold`, what goes on from every slice is a constant that derivatives are taken by."""
        inner: dict[str, Tensor] = {}
        held: dict[str, Tensor] = {}
        ends: list[Tensor] = []

        def answer(x: Tensor, matrix: Matrix, known: Tensor | None) -> Tensor:
            own, name = self.decomposition.of(matrix.name), matrix.name
            inner[name] = x @ own.U.detach()
            held[name] = inner[name].detach().requires_grad_() if hold else inner[name]
            out = (held[name] * self.g[name]) @ own.V.detach()
            return out if matrix.bias is None else out + matrix.bias

        def enter(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            ends.append(args[0].detach().requires_grad_())
            return (ends[0], *args[1:]), kwargs

        first, last = self.target.blocks[0], self.target.blocks[-1]
        handles = [
            first.register_forward_pre_hook(enter, with_kwargs=True),
            last.register_forward_hook(lambda module, args, output: ends.append(hidden_of(output))),
        ]
        try:
            with torch.enable_grad(), answering(self.target, self.decomposition.names, answer):
                self.target.run(self.tokens.expand(rows, -1))
                length = self.tokens.shape[1]
                spots = torch.arange(1, rows + 1, device=self.tokens.device) * length - 1
                logits = outputs_after(self.target, ends[1], spots)
                return MaskedPass(inner, held, ends[0], logits - logits.mean(-1, keepdim=True))
        finally:
            for handle in handles:
                handle.remove()


def likeliest(model: MaskedModel, count: int) -> list[GraphNode]:
    """The tokens that may follow, the likeliest first, not labelled yet."""
    p, tokens = model.run(1, False).logits[0].softmax(-1).detach().topk(count)
    last = model.tokens.shape[1] - 1
    return [
        GraphNode(kind="logit", position=last, token=token, probability=value, label="")
        for value, token in zip(p.tolist(), tokens.tolist(), strict=True)
    ]


def total_effects(model: MaskedModel, tokens: Sequence[int]) -> dict[str, Tensor]:
    """The effect of every slice on the logit of each of `tokens`, `[R, T, C]` a matrix, a row a token."""
    run = model.run(len(tokens), False)
    rows = torch.arange(len(tokens), device=run.logits.device)
    goal = run.logits[rows, torch.tensor(tokens, device=rows.device)].sum()
    names = list(run.inner)
    grads = torch.autograd.grad(goal, [run.inner[name] for name in names], allow_unused=True)
    return {
        name: torch.zeros_like(run.inner[name]) if grad is None else (run.inner[name] * grad).detach()
        for name, grad in zip(names, grads, strict=True)
    }


def most_effective(model: MaskedModel, logits: Sequence[GraphNode], threshold: float, top: int) -> list[GraphNode]:
    """The `top` active slices of most effect, the first one's first, not labelled yet."""
    effects = total_effects(model, [node.token or 0 for node in logits])
    p = torch.tensor([node.probability for node in logits], device=model.tokens.device)
    inner = model.run(1, False).inner
    places: list[tuple[str, int, int]] = []
    sizes = []
    for name, values in effects.items():
        where = (model.g[name][0] > threshold).nonzero()
        size = (p.to(values)[:, None, None] * values.abs()).sum(0)[where[:, 0], where[:, 1]]
        sizes.append(size)
        places += [(name, position, index) for position, index in where.tolist()]
    size = torch.cat(sizes)
    order = size.argsort(descending=True, stable=True)
    shares = (size[order].cumsum(0) / size.sum().clamp(min=torch.finfo(size.dtype).tiny)).tolist()
    return [
        GraphNode(
            kind="slice",
            position=position,
            label="",
            block=model.target.matrices[name].block,
            matrix=name,
            index=index,
            activation=inner[name][0, position, index].item(),
            importance=model.g[name][0, position, index].item(),
            influence=share,
        )
        for (name, position, index), share in zip(
            [places[number] for number in order[:top].tolist()], shares[:top], strict=True
        )
    ]


def direct_links(model: MaskedModel, nodes: Sequence[GraphNode], report: Report) -> Iterator[GraphLink]:
    """Every link between `nodes` that is not 0. A row a target, so that one backward pass serves many."""
    targets = [number for number, node in enumerate(nodes) if node.kind != "embedding"]
    sources = [number for number, node in enumerate(nodes) if node.kind == "slice"]
    embeddings = {node.position: number for number, node in enumerate(nodes) if node.kind == "embedding"}
    step = max(1, ROW_TOKENS // model.tokens.shape[1])
    for start in range(0, len(targets), step):
        chunk = targets[start : start + step]
        run = model.run(len(chunk), True)
        names = list(run.held)
        leaves = [*(run.held[name] for name in names), run.entry]
        grads = torch.autograd.grad(_goal(run, [nodes[number] for number in chunk]), leaves, allow_unused=True)
        moved = [None if grad is None else leaf.detach() * grad for leaf, grad in zip(leaves, grads, strict=True)]
        of_slices = dict(zip(names, moved[:-1], strict=True))
        for number, weights in _columns(of_slices, moved[-1], nodes, sources, embeddings).items():
            for target, weight in zip(chunk, weights, strict=True):
                if weight != 0.0:
                    yield GraphLink(number, target, weight)
        report(Progress("links", min(start + step, len(targets)), len(targets)))


def _goal(run: MaskedPass, targets: Sequence[GraphNode]) -> Tensor:
    """The sum of what the targets are, the i-th one in row i."""
    of: dict[str, list[tuple[int, int, int]]] = {}
    for row, node in enumerate(targets):
        of.setdefault(node.matrix or "", []).append(
            (row, node.position, (node.token if node.matrix is None else node.index) or 0)
        )
    goal = run.logits.new_zeros(())
    for name, places in of.items():
        rows, positions, index = torch.tensor(places, device=goal.device).unbind(1)
        goal = goal + (run.inner[name][rows, positions, index] if name else run.logits[rows, index]).sum()
    return goal


def _columns(
    of_slices: Mapping[str, Tensor | None],
    of_entry: Tensor | None,
    nodes: Sequence[GraphNode],
    sources: Sequence[int],
    embeddings: Mapping[int, int],
) -> dict[int, list[float]]:
    """The weights of the links from every source, one a row, by the source's number."""
    columns = {}
    for number in sources:
        node = nodes[number]
        moved = of_slices[node.matrix or ""]
        if moved is not None:
            columns[number] = moved[:, node.position, node.index]
    if of_entry is not None:
        columns |= {number: of_entry[:, position].sum(-1) for position, number in embeddings.items()}
    return dict(zip(columns, torch.stack(list(columns.values())).tolist(), strict=True)) if columns else {}


def labelled(subject: Subject, decomposition: Decomposition, nodes: Sequence[GraphNode]) -> list[GraphNode]:
    """The slices with their address and the tokens that they promote for labels."""
    lens = TokenLens(subject.target, subject.routes, subject.token_text)
    named = list(nodes)
    for name in dict.fromkeys(node.matrix or "" for node in nodes):
        numbers = [number for number, node in enumerate(nodes) if node.matrix == name]
        V = decomposition.of(name).V.detach()
        signs = V.new_tensor([-1.0 if (nodes[number].activation or 0) < 0 else 1.0 for number in numbers])
        index = torch.tensor([nodes[number].index or 0 for number in numbers], device=V.device)
        for number, tokens in zip(numbers, lens.promotes(name, V[index], LABELS, signs), strict=True):
            address = f"{name}:{nodes[number].index}"
            said = " ".join(repr(token) for token in tokens)
            named[number] = replace(nodes[number], label=f"{address} promotes {said}" if said else address)
    return named
