"""Take one small model of every timm architecture class the whole way, and write down which of them get there.

Each class is wrapped, trained a step under ZeRO 2 on two ranks, saved, loaded, evaluated, and run stage by stage on a
shrinking batch; see docs/reference/backbones.md, which this writes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shared.backbones_page import Results, page
from benchmarks.shared.families import FAMILIES, Family
from benchmarks.shared.locations import REPOSITORY, RESULTS
from benchmarks.shared.rank_pair import RankPair

MEASURED = RESULTS / "backbones.jsonl"
PAGE = REPOSITORY / "docs" / "reference" / "backbones.md"


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    line = argparse.ArgumentParser(prog="benchmarks/backbones.py", description=__doc__)
    line.add_argument("models", nargs="*", help="timm names of the list to take; by default all of them")
    line.add_argument("--seconds", type=float, default=300.0, help="time limit per class")
    line.add_argument("--again", action="store_true", help="take classes anew that the results file already has")
    line.add_argument("--only-page", action="store_true", help="write the page from the results file, run nothing")
    line.add_argument("--results", type=Path, default=MEASURED, help="file of results, one line per class")
    line.add_argument("--page", type=Path, default=PAGE, help="page to write")
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the classes that the results file lacks, then write the page; 1 if a class failed that should not."""
    options = parser().parse_args(arguments)
    unknown = set(options.models) - {family.model for family in FAMILIES}
    if unknown:
        print(f"models: {', '.join(sorted(unknown))} stand for no class; benchmarks/shared/families.py lists who does")
        return 1
    results = Results.read(options.results)
    if not options.only_page:
        if results.of_other_versions():
            if options.models:
                print(f"{options.results} is of other versions; run all classes again, without naming models")
                return 1
            results.records.clear()
        wanted = [f for f in FAMILIES if not options.models or f.model in options.models]
        run([f for f in wanted if options.again or (f.file, f.cls) not in results.records], results, options.seconds)
    options.page.write_text(page(results), encoding="utf-8")
    print(f"{results.passed} of {len(FAMILIES)} classes go the whole way: {options.page}")
    return 0 if results.good_enough else 1


def run(families: Sequence[Family], results: Results, seconds: float) -> None:
    """Take classes the whole way, one after another; every result is in the file before the next one starts."""
    with RankPair() as pair:
        for number, family in enumerate(families, start=1):
            record = pair.call(family, seconds)
            results.add(family, record)
            outcome = f"stopped at {record['failed']}: {record['reason']}" if record["failed"] else "all the way"
            print(f"[{number}/{len(families)}] {family.file} {family.cls} {family.model}: {outcome}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
