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


def environment():
    """One worker on a small machine, and a schedule that begins when all prompts are there.

    By itself it starts ten processes and the schedule at once: its first seconds are then sent late and all together,
    and what is measured is a queue that nobody asked for. Its Poisson schedule has the same effect at times (0.8.1 tells
    the workers to begin before it has set the time at which they should), so the rate is constant."""
    return {
        **common.offline(),
        "GUIDELLM__MAX_WORKER_PROCESSES": "1",
        "GUIDELLM__MAX_CONCURRENCY": "512",
        "GUIDELLM__SCHEDULER_START_DELAY_NON_DISTRIBUTED": "8",
    }


def main():
    args = common.arguments(__doc__)
    binaries = common.packages(args.work, "guidellm", "guidellm")
    tokenizer = common.tokenizer(args.work, binaries)
    print(common.version(binaries, "guidellm"))
    each = args.requests // ADAPTERS

    def load(interface, number):
        route = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}[interface]

        def with_server(server, name):
            out = args.work / f"{name}.json"
            common.run(
                [
                    binaries / "guidellm", "run",
                    "--backend", f"kind=openai_http,target={server.url},model={server.lora(number)},"
                                 f"request_format={route}",
                    "--profile", f"kind=constant,rate={args.rate}",
                    "--constraint", f"kind=max_requests,count={each}",
                    "--tokenizer", f"kind=huggingface_auto,model={tokenizer}",
                    "--data", "kind=synthetic_text,prompt_tokens=200,output_tokens=8",
                    "--output", f"kind=json,path={out}", "--disable-console",
                ],
                env=environment(),
            )
            return report(out)

        return with_server

    common.end(
        [
            common.compare(args, "guidellm", interface, load(interface, number), each, f"lora-{number}")
            for interface in args.interfaces
            for number in range(ADAPTERS)
        ]
    )


if __name__ == "__main__":
    main()
