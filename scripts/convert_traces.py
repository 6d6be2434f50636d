#!/usr/bin/env python3
"""Makes the files in configs/traces/ from their public sources.

    scripts/convert_traces.py lengths sharegpt_8k_llama2_token_lengths.csv configs/traces/sharegpt-llama2-lengths.csv
    scripts/convert_traces.py peer short_r8.json configs/traces/peer-short-r8.jsonl

`lengths`: the table of the sarathi-serve repository (Apache-2.0), two columns with a header, as it is but
for the header. `peer`: a JSON list of {"t" in s, "prompt_len", "adapter", "output_tokens"}.
"""

import json
import os
import sys

LENGTHS_HEAD = """\
# Conversations of ShareGPT as prompt and output lengths in Llama-2 tokens; no text.
# Source: sharegpt_8k_llama2 of the sarathi-serve repository (Microsoft Research), Apache-2.0; header line replaced.
prompt_tokens,output_tokens
"""

PEER_SOURCE = (
    "trace replayed on vLLM 0.24.0 for comparison; Poisson arrivals, prompt lengths of the {regime} regime from "
    "sharegpt_8k_llama2 of sarathi-serve (Apache-2.0), adapters drawn uniformly from 128; its seed is not recorded"
)


def lengths(text):
    rows = text.split()
    if rows[0] != "num_prefill_tokens,num_decode_tokens":
        sys.exit(f"unexpected header: {rows[0]}")
    for number, row in enumerate(rows[1:], 2):
        prompt, output = row.split(",")
        if int(prompt) < 1 or int(output) < 1:
            sys.exit(f"line {number}: {row}")
    return LENGTHS_HEAD + "\n".join(rows[1:]) + "\n"


def peer(text):
    requests = json.loads(text)
    regime = "long" if max(r["prompt_len"] for r in requests) > 1024 else "short"
    header = {"schema": 1, "source": PEER_SOURCE.format(regime=regime), "seed": 0, "popularity": "uniform"}
    lines = [header]
    for number, r in enumerate(requests):
        lines.append(
            {
                "id": number,
                "arrival_s": r["t"],
                "prompt_tokens": r["prompt_len"],
                "output_tokens": r["output_tokens"],
                "adapter": r["adapter"],
                "rank": 16,
            }
        )
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)


def main():
    kinds = {"lengths": lengths, "peer": peer}
    if len(sys.argv) != 4 or sys.argv[1] not in kinds:
        sys.exit(__doc__)
    with open(sys.argv[2], encoding="utf-8") as source:
        text = kinds[sys.argv[1]](source.read())
    part = sys.argv[3] + ".part"
    with open(part, "w", encoding="utf-8") as out:
        out.write(text)
    os.replace(part, sys.argv[3])


if __name__ == "__main__":
    main()
