#!/usr/bin/env python3
"""What takes a step's time, kernel by kernel, from a trace of inject.c.

    kernel_trace.py trace.tsv [--with NAME] [--without NAME] [--grid NAME=GRID]

A step is what the stream of most kernels does without a pause of 15 us. Of the steps that have a kernel of each name
--with and of none --without (a name's beginning will do), each kernel's own part is the time from the moment when all
before it had ended to its own end: kernels that run side by side are counted once. Prints the medians over the steps.
"""

import argparse
import collections
import statistics
from typing import NamedTuple

PAUSE_NS = 15_000


class Record(NamedTuple):
    begin: int
    end: int
    grid: str
    stream: str
    name: str


def read(path):
    with open(path) as lines:
        fields = (line.rstrip("\n").split("\t") for line in lines)
        return sorted(Record(int(f[0]), int(f[1]), f[2], f[6], f[8]) for f in fields if len(f) == 9)


def steps_of(records):
    # Most of what runs is the steps' stream's; copies of adapters have another.
    stream = collections.Counter(record.stream for record in records).most_common(1)[0][0]
    step, end = [], 0
    for record in records:
        if record.stream != stream:
            continue
        if step and record.begin - end > PAUSE_NS:
            yield step
            step = []
        step.append(record)
        end = max(end, record.end)
    if step:
        yield step


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--with", dest="having", action="append", default=[], metavar="NAME")
    parser.add_argument("--without", action="append", default=[], metavar="NAME")
    parser.add_argument("--grid", action="append", default=[], metavar="NAME=GRID")
    args = parser.parse_args()
    grids = [g.rsplit("=", 1) for g in args.grid]

    def wanted(step):
        def has(name, grid=None):
            return any(r.name.startswith(name) and grid in (None, r.grid) for r in step)

        asked = all(map(has, args.having)) and all(has(*g) for g in grids)
        return asked and not any(map(has, args.without))

    steps = [step for step in steps_of(read(args.trace)) if wanted(step)]
    if not steps:
        raise SystemExit(f"no step in {args.trace} has such kernels")
    of_kernel = collections.defaultdict(list)
    for step in steps:
        sums, end = collections.defaultdict(lambda: [0, 0]), step[0].begin
        for record in step:
            of = sums[record.name, record.grid]
            of[0] += 1
            of[1] += max(0, record.end - end)
            end = max(end, record.end)
        for kernel, of in sums.items():
            of_kernel[kernel].append(of)
    spans = [(max(r.end for r in step) - step[0].begin) * 1e-6 for step in steps]
    print(f"{len(steps)} steps, of {min(spans):.2f} to {max(spans):.2f} ms, half of them under {statistics.median(spans):.2f}")
    print(f"{'in all, us':>11} {'times':>6} {'each, us':>9}  kernel, grid")
    rows = []
    for (name, grid), of in of_kernel.items():
        times, ns = (statistics.median(column) for column in zip(*of))
        rows.append((ns * 1e-3, times, ns * 1e-3 / times, f"{name}, {grid}"))
    for total, times, each, kernel in sorted(rows, reverse=True):
        print(f"{total:11.1f} {times:6.0f} {each:9.2f}  {kernel}")


if __name__ == "__main__":
    main()
