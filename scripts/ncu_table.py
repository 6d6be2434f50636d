#!/usr/bin/env python3
"""The few columns that one reads of what Nsight Compute has to say of some kernels, as CSV.

    ncu --csv --page raw --clock-control none --section SpeedOfLight --section LaunchStats --section Occupancy \\
        --section WarpStateStats --section MemoryWorkloadAnalysis -k regex:lora_shrink -c 4 PROGRAM > raw.csv
    ncu_table.py raw.csv... > table.csv

A row is one launch. `stalls` are the reasons for which a warp waits longest, in cycles an issued instruction.
"""

import csv
import sys

COLUMNS = {
    "kernel": "Kernel Name",
    "grid": "Grid Size",
    "block": "Block Size",
    "registers": "launch__registers_per_thread",
    "shared_bytes": "launch__shared_mem_per_block",
    "ns": "gpu__time_duration.sum",
    "sm_percent": "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "memory_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "l2_hits_percent": "lts__t_sector_hit_rate.pct",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "waves": "launch__waves_per_multiprocessor",
}
STALLED = "smsp__average_warps_issue_stalled_"
SHOWN = 4


def number(value):
    """Without the commas of thousands; shapes keep theirs."""
    bare = value.replace(",", "")
    return bare if bare.replace(".", "").isdigit() else value


def stalls(row):
    of = {
        name.removeprefix(STALLED).removesuffix("_per_issue_active.ratio"): float(value)
        for name, value in row.items()
        if name.startswith(STALLED) and name.endswith("_per_issue_active.ratio") and value
    }
    longest = sorted(of.items(), key=lambda item: -item[1])[:SHOWN]
    return " ".join(f"{name}={value:.1f}" for name, value in longest)


def main():
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["what", *COLUMNS, "stalls"])
    for path in sys.argv[1:]:
        with open(path) as file:
            # The program's own output is mixed in; the second row has the units.
            rows = list(csv.DictReader(line for line in file if line.startswith('"')))
        if not rows:
            raise SystemExit(f"{path}: no launch in it; was it written with --csv --page raw?")
        what = path.rsplit("/", 1)[-1].removesuffix(".csv")
        for row in rows[1:]:
            missing = [name for name in COLUMNS.values() if name not in row]
            if missing:
                raise SystemExit(f"{path} lacks {', '.join(missing)}: name the sections that the usage names")
            out.writerow([what, *map(number, (row[name] for name in COLUMNS.values())), stalls(row)])


if __name__ == "__main__":
    main()
