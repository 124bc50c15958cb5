"""Pieces of the explorer's screen as text: cells of the map, names of tokens, bars of probability."""

from __future__ import annotations

from rich.text import Text

from spdcli.explorer.exploration import NextTokens
from spdcli.explorer.features import OutputChanges

ON, OFF = "●", "○"
NOTHING = "·"
LABEL_WIDTH, TOKEN_WIDTH, NAME_WIDTH = 24, 12, 14
OUTPUT_COLUMNS = 23  # of an output's line, but for its bar
KEPT, LOST, GAINED = "█", "░", "▓"
# From dark blue over grey to yellow, ever lighter: told apart by the colour-blind, and in grey.
RAMP = ((0, 34, 78), (53, 69, 108), (102, 105, 112), (148, 142, 119), (200, 184, 102), (254, 232, 56))


def shade(share: float) -> tuple[int, int, int]:
    """The colour of a share in [0, 1] of the hottest cell."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    red, green, blue = (round(a + (place - low) * (b - a)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True))
    return red, green, blue


def heat_cell(value: float, share: float) -> Text:
    """A sum of importances: its number, on a ground as light as its share of the hottest cell; a dot for 0."""
    if value <= 0:
        return Text(NOTHING, style="dim", justify="right")
    red, green, blue = shade(share)
    ink = "black" if share > 0.46 else "white"
    return Text(
        f"{value:.2f}" if value < 10 else f"{value:.0f}", style=f"{ink} on rgb({red},{green},{blue})", justify="right"
    )


def matrix_label(name: str) -> Text:
    """A matrix's name; of one that is too long, its end."""
    return Text(name if len(name) <= LABEL_WIDTH else f"…{name[1 - LABEL_WIDTH :]}")


def cut_to(text: str, width: int) -> Text:
    """As much of a text as fits.

    >>> str(cut_to("abcdef", 4))
    'abc…'
    """
    return Text(text if len(text) <= width else f"{text[: width - 1]}…")


def visible(token: str) -> str:
    """A token with what cannot be seen written out."""
    return token if token.isprintable() else repr(token)[1:-1]


def shown_token(token: str) -> Text:
    """A token as the head of a column."""
    head = cut_to(visible(token.strip(" ")) or quoted(token), TOKEN_WIDTH)
    head.justify = "right"
    return head


def quoted(token: str) -> str:
    """A token between quotes, so that its spaces are seen."""
    return f"'{visible(token)}'"


def candidates(said: NextTokens, after: str, meaning: str, width: int, most: int) -> Text:
    """The next tokens, a line each, `most` of them: probability before and after, and a bar; the answer has an arrow
    and is never left out."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"next, after {after}", style="bold")
    text.append(f"  KL {said.kl:.3g}\n" if said.off else "\n")
    room = max(width - NAME_WIDTH - 15, 5)
    shown = said.tokens[: max(most, 2)]
    missed = [one for one in said.tokens if one.answer and one not in shown]
    for one in [*shown[: len(shown) - len(missed)], *missed]:
        style = "bold" if one.answer else ""
        name = cut_to(quoted(one.token), NAME_WIDTH).plain
        text.append(f"{'→' if one.answer else ' '} {name:<{NAME_WIDTH}} ", style=style)
        text.append(f"{one.before:.3f} ", style="dim")
        text.append(f"{one.after:.3f} ", style=style)
        text.append(bar(one.before, one.after, room) + "\n")
    text.append(f"before, now {KEPT} lost {LOST} gained {GAINED} off: {meaning}", style="dim")
    return text


def changed_outputs(said: OutputChanges, meaning: str, width: int, most: int) -> Text:
    """The outputs of a toy of sparse features, a line each, `most` of them: before and after, and a bar of what is
    above 0; those of features that are on have an arrow."""
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(f"outputs for {said.input}", style="bold")
    text.append(f"  squared change {said.squared:.3g}\n" if said.off else "\n")
    room = max(width - OUTPUT_COLUMNS, 5)
    whole = max(abs(value) for one in said.outputs for value in (one.before, one.after)) or 1.0
    for one in said.outputs[: max(most, 2)]:
        style = "bold" if one.on else ""
        text.append(f"{'→' if one.on else ' '} {one.feature:>4} ", style=style)
        text.append(f"{one.before:+.3f} ", style="dim")
        text.append(f"{one.after:+.3f} ", style=style)
        text.append(bar(max(one.before, 0) / whole, max(one.after, 0) / whole, room) + "\n")
    text.append(f"before, now {KEPT} lost {LOST} gained {GAINED} off: {meaning}", style="dim")
    return text


def bar(before: float, after: float, room: int) -> str:
    """What is kept of a probability, then what is lost or gained, of `room` cells in all.

    >>> bar(0.5, 0.25, 8), bar(0.25, 0.5, 8), bar(0.0, 0.0, 8)
    ('██░░', '██▓▓', '')
    """
    kept, whole = (round(share * room) for share in (min(before, after), max(before, after)))
    return KEPT * kept + (LOST if after < before else GAINED) * (whole - kept)
