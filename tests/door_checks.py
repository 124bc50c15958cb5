"""What the tests of the Python door share: equal runs, equal records, and a prompt."""

from __future__ import annotations

import torch

from spdcli.records import plain

KOBE = "Kobe Bryant plays professional basketball"


def equal(one, other):
    first, second = one.decomposition.state_dict(), other.decomposition.state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def same_as(said, record):
    """The record's JSON is in what a command said."""
    values = plain(record)
    assert values
    assert {key: said[key] for key in values} == values
