"""Damage at random, for as long as it is given, or so often: `make soak SECONDS=600`, `make soak TRIES=tensors:10000`.

Recipes, tensor files, model directories and the lives of processes are altered by a seeded generator. What follows must
be one line of an error or a right answer: no internal error, no hang over HANG seconds, no damage accepted, nothing
written outside the run. Prints what was tried and what failed; a failure's number repeats it (`--only KIND:NUMBER`).
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
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
    """How many trials of a kind were made, in how many seconds, and what went wrong, by the number of the trial."""

    kind: str
    tried: int = 0
    seconds: float = 0.0
    failures: dict[int, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.kind:10} {self.tried:7} tried {len(self.failures):4} failed {self.seconds:7.0f} s"


def soak(
    folder: Path,
    shares: Mapping[str, float],
    seconds: float = float("inf"),
    tries: Mapping[str, int] | None = None,
    first: int = 0,
    report: Callable[[Tally], object] = lambda tally: None,
) -> list[Tally]:
    """Trials of each kind for its share of the `seconds`, or so many `tries`; `first` is the number of the first.

    Trials work in an empty folder beside theirs, which they have to leave so. `report` is given each kind once done.
    """
    tallies, outside = [], folder / "outside"
    outside.mkdir()
    for name, share in shares.items():
        (folder / name).mkdir()
        trial, tally = KINDS[name](folder / name), Tally(name)
        begun, most = time.monotonic(), float("inf") if tries is None else tries[name]
        with contextlib.chdir(outside):
            while tally.tried < most and tally.seconds < share * seconds:
                number = first + tally.tried
                reason = attempt(trial, number, 20 * HANG if name == "kills" else HANG)
                if left := [path.name for path in outside.iterdir()]:
                    raise SystemExit(f"{name}:{number} wrote outside: {', '.join(left)}")
                if reason:
                    tally.failures[number] = reason
                tally.tried, tally.seconds = tally.tried + 1, time.monotonic() - begun
        tallies.append(tally)
        report(tally)
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
    about.add_argument("--tries", nargs="+", metavar="KIND:COUNT", help="how many trials of which kinds instead")
    about.add_argument("--memory", type=float, default=4, help="GiB that damage may take (4)")
    about.add_argument("--first", type=int, default=0, help="number of the first trial; another gives others (0)")
    about.add_argument("--only", metavar="KIND:NUMBER", help="one trial")
    about.add_argument("--json", action="store_true", help="one JSON object on standard output")
    options = about.parse_args()
    shares, tries, first, seconds = SHARES, None, options.first, options.seconds
    if options.only:
        name, first = counted(options.only)
        tries = {name: 1}
    elif options.tries:
        tries = dict(map(counted, options.tries))
    if tries is not None:
        shares, seconds = dict.fromkeys(tries, 1.0), float("inf")
    with tempfile.TemporaryDirectory() as folder:
        limit_memory(options.memory + 4)  # what libraries take when they are first used, too
        tallies = soak(Path(folder), shares, seconds, tries, first, tell)
    if options.json:
        print(json.dumps(summary(tallies, options.memory)))  # noqa: T201
    return int(any(tally.failures for tally in tallies))


def counted(text: str) -> tuple[str, int]:
    """A kind and a number, of `kind:number`."""
    name, _, number = text.partition(":")
    return name, int(number)


def tell(tally: Tally) -> None:
    """What became of the trials of a kind, for people."""
    lines = [str(tally), *(f"  {tally.kind}:{number} {why}" for number, why in list(tally.failures.items())[:10])]
    print(*lines, sep="\n", file=sys.stderr, flush=True)  # noqa: T201


def summary(tallies: list[Tally], memory: float) -> dict[str, object]:
    """What a whole soak came to, for the documents."""
    rows = [
        {"kind": one.kind, "tried": one.tried, "failed": len(one.failures), "seconds": round(one.seconds, 1)}
        for one in tallies
    ]
    return {"schema": "spd.soak/1", "memory_gib": memory, "hang_seconds": HANG, "kinds": rows}


if __name__ == "__main__":
    sys.exit(main())
