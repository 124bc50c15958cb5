"""Settings of a planted target that are fine one by one and cannot be together. Knows neither torch nor pydantic."""

from __future__ import annotations

from collections.abc import Iterator

from spdcli.recipe.choices import TOYS
from spdcli.recipe.contradiction import Contradiction, Sections


def planted_fits(recipe: Sections) -> Iterator[Contradiction]:
    """A planted target has room for its directions, triggers and subjects, and its own places to look at."""
    target = recipe["target"]
    if target["kind"] == "planted_induction":
        room, what = 2 * (target["tokens"] + target["triggers"]) + target["length"], "tokens, triggers and length"
        if target["length"] < 3 * target["triggers"]:
            yield Contradiction(
                ("target.length", "target.triggers"),
                f"[target] length = {target['length']}: {target['triggers']} triggers, their m and their return take "
                f"{3 * target['triggers']} tokens",
            )
    elif target["kind"] == "planted_lookup":
        room, what = 3 * target["subjects"], "subjects"
        if target["tokens"] < target["subjects"]:
            yield Contradiction(
                ("target.tokens", "target.subjects"),
                f"[target] tokens = {target['tokens']}: each of {target['subjects']} subjects has a token of its own",
            )
    else:
        return
    if recipe["losses"]["last_token_only"]:
        yield Contradiction(
            ("losses.last_token_only", "target.kind"),
            "[losses] last_token_only: a planted model says itself where its answers are, not only at the end",
        )
    if room > target["d_model"]:
        yield Contradiction(
            ("target.d_model",),
            f"[target] d_model = {target['d_model']} cannot hold the {room} directions that {what} take",
        )


def maker_of_sequences(kind: str) -> str | None:
    """The target, in words, where it has no fixed set of prompts."""
    if kind in TOYS:
        return "the induction toy" if kind == "induction" else "a toy"
    return "a planted model" if kind in ("planted_induction", "planted_lookup") else None
