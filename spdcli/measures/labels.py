"""Labels of slices: the tokens that a write direction promotes and that a read direction answers to.

Letters: N vocabulary, D width of the residual stream, C slices, I d_in, O d_out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from spdcli.engine.target import Target
from spdcli.targets.routes import Route


@dataclass(frozen=True, eq=False)
class TokenLens:
    """Reads directions of a target's matrices as tokens.

    `routes` ties each matrix to the residual stream; `token_text` names a token id.
    """

    target: Target
    routes: dict[str, Route]
    token_text: Callable[[int], str]

    @torch.no_grad()
    def promotes(self, matrix: str, V: Tensor, top: int, signs: Tensor | None = None) -> list[list[str]]:
        """For each slice, the `top` tokens whose logits rise most when it is active.

        `V` is `[C, O]`; `signs` `[C]` is the sign of each slice's inner activation (+1 when left out),
        since a negative activation writes against `V`. A linear approximation: the direction goes
        straight to the final norm, whose weight scales it, and the unembedding; on the way out of
        its block it passes the matrices behind it, but no activation function, no gate and no mixing
        of positions; later blocks are left out. Queries and keys promote nothing: empty lists.
        """
        out = self.routes[matrix].out
        if out is None:
            return [[] for _ in range(V.shape[0])]
        written = out(signed(V, signs).to(self.target.unembedding))
        return self.name_top(written @ self.target.unembedding.T, top)

    @torch.no_grad()
    def reads(self, matrix: str, U: Tensor, top: int, signs: Tensor | None = None) -> list[list[str]]:
        """For each slice, the `top` tokens whose embeddings drive its inner activation most.

        `U` is `[I, C]`; `signs` `[C]` as in `promotes`: -1 asks for the most negative activation. An
        embedding alone (no position, nothing written by earlier blocks) goes through the norm that
        the matrix's block reads it by; a matrix in the middle of its block reads it through the
        matrix before it, without activation function, gate or mixing of positions.
        """
        route = self.routes[matrix]
        if route.into is None:
            return [[] for _ in range(U.shape[1])]
        read = route.into(signed(U.T, signs).T.to(self.target.embedding))
        return self.name_top((route.norm(self.target.embedding) @ read).T, top)

    def name_top(self, scores: Tensor, top: int) -> list[list[str]]:
        """The texts of the `top` tokens of each row of `[C, N]`, best first."""
        best = scores.topk(min(top, scores.shape[1]), dim=1).indices.tolist()
        return [[self.token_text(token) for token in row] for row in best]


def signed(directions: Tensor, signs: Tensor | None) -> Tensor:
    """Rows `[C, ...]` times their signs `[C]`."""
    return directions if signs is None else directions * signs[:, None].to(directions)
