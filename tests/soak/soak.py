"""Damage at random, for as long as it is given: `make soak SECONDS=600`.

Recipes, tensor files, model directories and the lives of processes are altered by a seeded generator. What follows must
be one line of an error or a right answer: no internal error, no hang over HANG seconds, no damage accepted, nothing
written outside the run. Prints what was tried and what failed; a failure's number repeats it (`--only KIND:NUMBER`).
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from soak.damage import KINDS, Trial
from spdcli.cli import as_expected
from spdcli.errors import RecipeError

HANG = 10.0  # seconds
SHARES = {"documents": 0.2, "tensors": 0.3, "models": 0.3, "kills": 0.2}  # of the time


class Hang(BaseException):
    """A trial that takes too long; no handler for errors stops it."""


@dataclass
class Tally:
    """How many trials of a kind were made, and what went wrong, by the number of the trial."""

    tried: int = 0
    failures: dict[int, str] = field(default_factory=dict)


def soak(
    folder: Path,
    shares: Mapping[str, float],
    seconds: float = float("inf"),
    tries: Mapping[str, int] | None = None,
    first: int = 0,
) -> dict[str, Tally]:
    """Trials of each kind for its share of the `seconds`, or so many `tries`; `first` is the number of the first."""
    tallies = {}
    for name, share in shares.items():
        (folder / name).mkdir()
        trial, tally = KINDS[name](folder / name), Tally()
        end = time.monotonic() + share * seconds
        most = float("inf") if tries is None else tries[name]
        while tally.tried < most and time.monotonic() < end:
            number = first + tally.tried
            if reason := attempt(trial, number, 20 * HANG if name == "kills" else HANG):
                tally.failures[number] = reason
            tally.tried += 1
        tallies[name] = tally
    return tallies


def attempt(trial: Trial, number: int, limit: float = HANG) -> str | None:
    """What went wrong in a trial; None where all that came of it was right."""
    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, raise_hang)
    signal.setitimer(signal.ITIMER_REAL, limit)
    faulthandler.dump_traceback_later(3 * limit, exit=True)  # should it hang where Python hears no signal
    try:
        trial(random.Random(number))
    except AssertionError as error:
        return f"damage accepted: {error}"
    except Exception as error:
        expected = as_expected(error)
        if expected.message.startswith("internal error"):
            return "".join(traceback.format_exception(error)[-3:])
        if "\n" in expected.message and not isinstance(error, RecipeError):
            return f"more than a line: {expected.message}"
    except BaseException as error:
        return f"past every handler: {type(error).__name__}: {error}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
    took = time.monotonic() - begun
    return f"{took:.1f} seconds" if took > limit else None


def raise_hang(number: int, frame: object) -> None:
    raise Hang


def limit_memory(gibibytes: float) -> None:
    """Let this process have so much more memory than it has now, and no more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + int(gibibytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> int:
    """The command line; 1 where something failed."""
    about = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    about.add_argument("--seconds", type=float, default=60, help="how long, all kinds together (60)")
    about.add_argument("--memory", type=float, default=4, help="GiB that damage may take (4)")
    about.add_argument("--first", type=int, default=0, help="number of the first trial; another gives others (0)")
    about.add_argument("--kinds", default=",".join(SHARES), help="which kinds (all)")
    about.add_argument("--only", help="one trial, as in tensors:17")
    options = about.parse_args()
    shares = {name: SHARES[name] for name in options.kinds.split(",")}
    shares = {name: share / sum(shares.values()) for name, share in shares.items()}
    tries, first = None, options.first
    if options.only:
        name, _, number = options.only.partition(":")
        shares, tries, first = {name: 1.0}, {name: 1}, int(number)
    with tempfile.TemporaryDirectory() as folder:
        limit_memory(options.memory + 4)  # what libraries take when they are first used, too
        tallies = soak(Path(folder), shares, options.seconds if tries is None else float("inf"), tries, first)
    for name, tally in tallies.items():
        print(f"{name:10} {tally.tried:7} tried {len(tally.failures):4} failed")  # noqa: T201
        for number, reason in list(tally.failures.items())[:10]:
            print(f"  {name}:{number} {reason}")  # noqa: T201
    return int(any(tally.failures for tally in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
