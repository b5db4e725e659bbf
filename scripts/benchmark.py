"""Measures this project beside what others would use: turns, medians, ratios; writes a table, JSON and a plot.

OMP_NUM_THREADS=2 python scripts/benchmark.py backbone --backbones vits14 vitb14 --repeats 7

Times depend on what else the machine does; the ratios are taken within a turn and hardly do.
"""

import argparse
import importlib
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dense_heads.benchmark import PARTS
from dense_heads.errors import UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the command line, measures one part, writes the results. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    modules = {}
    for name, purpose in PARTS.items():
        modules[name] = importlib.import_module(f"dense_heads.benchmark.{name}")
        part = parts.add_parser(name, help=purpose, description=modules[name].__doc__)
        part.add_argument("--repeats", type=int, default=7, help="turns that count (default %(default)s)")
        part.add_argument("--warmups", type=int, default=1, help="turns before that do not (default %(default)s)")
        part.add_argument("--output", type=Path, default=Path("outputs/benchmark"), help="folder (default %(default)s)")
        modules[name].add_arguments(part)
    typed = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(typed)

    from dense_heads.benchmark.protocol import measure
    from dense_heads.benchmark.results import machine, print_results, write

    logging.basicConfig(format="%(message)s")
    logging.getLogger("dense_heads").setLevel(logging.INFO)
    on = machine()  # before: its load is that of others
    try:
        with tempfile.TemporaryDirectory() as scratch:
            cases = modules[arguments.part].cases(arguments, Path(scratch))
            results = measure(cases, arguments.repeats, arguments.warmups)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print_results(results)
    print(write(arguments.output, arguments.part, typed, on, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
