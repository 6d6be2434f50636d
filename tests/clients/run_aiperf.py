"""`aiperf` against `serve`: python tests/clients/run_aiperf.py [--work DIR] [--program FILE]"""

import json

import common


def report(folder):
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
    print(common.version(binaries, "aiperf"))

    def load(interface):
        def with_server(server, name):
            folder = args.work / name
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
            return report(folder)

        return with_server

    common.end([common.compare(args, "aiperf", i, load(i), args.requests) for i in args.interfaces])


if __name__ == "__main__":
    main()
