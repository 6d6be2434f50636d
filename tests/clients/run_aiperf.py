"""`aiperf` against `serve`: python tests/clients/run_aiperf.py [--work DIR] [--program FILE]"""

import json

import common


def report(folder, sent):
    """From the client's own JSON of the whole run."""
    result = json.loads(next(folder.rglob("profile_export_aiperf.json")).read_text())
    errors = result.get("error_request_count") or {}
    return {
        "requests": int(result["request_count"]["avg"]),
        "errors": int(errors.get("avg", 0)) + len(result.get("error_summary") or []),
        "ttft_ms": result["time_to_first_token"]["p50"],
    }


def main():
    args = common.arguments(__doc__)
    binaries = common.packages(args.work, "aiperf", "aiperf")
    tokenizer = common.tokenizer(args.work, binaries)
    held = []
    for interface in args.interfaces:
        name = f"aiperf-{interface}"
        folder = args.work / name
        with common.serving(args, name) as server:
            # Not told to be offline: then it would look for a folder's name in its cache.
            common.run(
                [
                    binaries / "aiperf", "profile", "--url", server.url, "--endpoint-type", interface, "--streaming",
                    "--model", ",".join(server.lora(n) for n in range(server.adapters)),
                    "--model-selection-strategy", "round_robin", "--tokenizer", tokenizer,
                    "--request-rate", args.rate, "--request-count", args.requests,
                    "--isl", 200, "--osl", 8, "--extra-inputs", "ignore_eos:true", "--random-seed", 1,
                    "--artifact-dir", folder, "--ui", "none",
                ]
            )
            server_ms = server.stop()
        held.append(common.judge("aiperf", interface, report(folder, args.requests), server_ms, args.requests))
    common.end(held)


if __name__ == "__main__":
    main()
