"""`guidellm` against `serve`: python tests/clients/run_guidellm.py [--work DIR] [--program FILE]

It names one model a run, so each of four adapters gets a run of its own on the same server."""

import json

import common

ADAPTERS = 4


def report(path):
    """From the client's own JSON of one run."""
    metrics = json.loads(path.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]
    return {
        "requests": totals["successful"],
        "errors": totals["errored"],
        "ttft_ms": metrics["time_to_first_token_ms"]["successful"]["median"],
    }


def main():
    args = common.arguments(__doc__)
    binaries = common.packages(args.work, "guidellm", "guidellm")
    tokenizer = common.tokenizer(args.work, binaries)
    each = args.requests // ADAPTERS
    held = []
    for interface in args.interfaces:
        route = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}[interface]
        for number in range(ADAPTERS):
            name = f"guidellm-{interface}-{number}"
            out = args.work / f"{name}.json"
            with common.serving(args, name) as server:
                common.run(
                    [
                        binaries / "guidellm", "run",
                        "--backend", f"kind=openai_http,target={server.url},model={server.lora(number)},"
                                     f"request_format={route}",
                        "--profile", f"kind=poisson,rate={args.rate}",
                        "--constraint", f"kind=max_requests,count={each}",
                        "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
                        "--data", "kind=synthetic_text,prompt_tokens=200,output_tokens=8",
                        "--output", f"kind=json,path={out}", "--disable-console",
                    ],
                    env=common.offline(),
                )
                server_ms = server.stop()
            held.append(common.judge("guidellm", f"{interface} {server.lora(number)}", report(out), server_ms, each))
    common.end(held)


if __name__ == "__main__":
    main()
