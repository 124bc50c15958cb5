"""How the matrices of a language model are tied to the residual stream, for the labels of their slices."""

from __future__ import annotations

from torch import Tensor, nn

from spdcli.engine.target import Matrix
from spdcli.targets.block_layout import RESIDUAL, MatrixEntry
from spdcli.targets.huggingface import LanguageModel, matrix_parts, walk_matrices
from spdcli.targets.routes import Map, Route, back_through, detached, final_scale, sum_of_columns, through, unchanged


def build_routes(language_model: LanguageModel, split_attention: bool) -> dict[str, Route]:
    """The route of every matrix that `huggingface.build_target` names, for the labels of its slices."""
    blocks = [_BlockRoutes(language_model, number) for number in range(len(language_model.blocks))]
    return {
        matrix.name: blocks[matrix.block].route(entry, part)
        for matrix, entry, part in walk_matrices(language_model, split_attention)
    }


class _BlockRoutes:
    """The ways through one block, from its weights `[I, O]`, parts of fused ones included, by path inside the block."""

    def __init__(self, language_model: LanguageModel, number: int) -> None:
        self.block, self.head_width = language_model.blocks[number], language_model.head_width
        self.end = final_scale(language_model.final_norm)
        self.norms: dict[str, Map] = {}
        self.weights: dict[str, Tensor] = {}
        self.parts: dict[str, dict[str, Matrix]] = {}
        self.writes = {entry.module: entry.writes for entry in language_model.architecture.matrices}
        for whole, entry, _ in walk_matrices(language_model, False):
            if whole.block != number:
                continue
            self.norms[entry.module] = self.norm(entry)
            self.weights[entry.module] = whole.stored.detach()
            self.parts[entry.module] = matrix_parts(whole, entry, language_model) if entry.parts else {}
            for part, matrix in self.parts[entry.module].items():
                self.norms[f"{entry.module}.{part}"] = self.norms[entry.module]
                self.weights[f"{entry.module}.{part}"] = matrix.stored.detach()

    def route(self, entry: MatrixEntry, part: str | None) -> Route:
        """The route of the matrix of `entry`, or of one part of it."""
        into = unchanged if entry.reads is None else back_through(self.weights[entry.reads], self.head_width)
        if part is not None:
            out = self.outward(dict(entry.parts)[part])
        elif entry.parts:
            out = self.outward_of_all(entry)
        else:
            out = self.outward(entry.writes)
        return Route(self.norms[entry.module], into, out)

    def norm(self, entry: MatrixEntry) -> Map:
        """The norm between the residual stream and a matrix, or and the matrix that it reads."""
        if entry.reads is not None:
            return self.norms[entry.reads]
        present: list[nn.Module] = [
            norm for norm in (getattr(self.block, name, None) for name in entry.norms) if norm is not None
        ]
        return detached(present[0]) if present else unchanged

    def outward(self, writes: str | None) -> Map | None:
        """The way of a matrix's output to the final residual stream; None where there is none."""
        if writes is None:
            return None
        if writes == RESIDUAL:
            return self.end
        if writes in self.weights:
            onward = self.outward(self.writes[writes])
            assert onward is not None, f"{writes} leads nowhere"
            return through(self.weights[writes], onward, self.head_width)
        scale, end = final_scale(self.block.get_submodule(writes)), self.end
        return lambda directions: end(scale(directions))

    def outward_of_all(self, entry: MatrixEntry) -> Map | None:
        """The way out of a fused matrix: the sum of its parts' ways."""
        ways = [(self.parts[entry.module][part].covered, self.outward(writes)) for part, writes in entry.parts]
        known = [(columns, out) for columns, out in ways if out is not None]
        return sum_of_columns(known) if known else None
