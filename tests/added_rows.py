"""Rows that a user might add, put into the tables before anything reads them; and `spd` with them.

Imported (`pytest -p added_rows`), it adds the rows. Run, it reads a JSON list of command lines, runs each, and prints
for each its exit code, standard output and standard error.
"""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

from spdcli.engine import part_tables, tables

tables.SOURCES["half"] = tables.Source("masks half-way between g and 1, the delta at half", "added_code:half")
tables.SCOPES["pairs"] = tables.Choice("two neighbouring matrices", "added_code:neighbours")
tables.LOSSES["half_recon"] = tables.Loss("half_recon", "nowhere", "KL at half", "half", "pairs", reported=True)
part_tables.IMPORTANCE_FUNCTIONS["affine"] = part_tables.ImportanceFunction("no hidden layer", "added_code:AffineGates")
part_tables.STARTS["all_ones"] = part_tables.Start("the same everywhere", "added_code:ones_start")
part_tables.SCHEDULES["steep"] = tables.Choice("a parabola", "added_code:steep")


def add_benchmark() -> None:
    """A row of its own table, which reads the tables above when it is imported."""
    from spdcli.costs.cases import BENCHMARKS, Benchmark, Options
    from spdcli.costs.groups import Case, Group

    def groups(options: Options) -> list[Group]:
        sizes = ("target.length=6", "target.d_model=4", "decompose.batch=2", "slices.C=3")
        return [Group([Case("affine by half", "induction", (*sizes, "importance.kind=affine", "losses.half_recon=1"))])]

    BENCHMARKS["halves"] = Benchmark("a loss of one's own", groups)


add_benchmark()


def run(arguments: list[str]) -> tuple[object, str, str]:
    """`spd` with `arguments`: exit code, standard output, standard error."""
    from spdcli.cli import main

    sys.argv = ["spd", *arguments]
    out, err, code = StringIO(), StringIO(), None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


if __name__ == "__main__":
    print(json.dumps([run(arguments) for arguments in json.load(sys.stdin)]))  # noqa: T201
