"""`oha` against `serve`: python tests/clients/run_oha.py [--work DIR] [--program FILE]

It knows nothing of tokens: with one output token, not streamed, the whole answer's time is the TTFT. The mix
of adapters is a file of bodies, one a line."""

import json
import subprocess

import common


def install(work):
    """`oha` built by cargo into `work`."""
    program = work / "oha/bin/oha"
    if not program.exists():
        print(f"building oha into {work / 'oha'}", flush=True)
        subprocess.run(["cargo", "install", "--quiet", "--locked", "oha", "--root", work / "oha",
                        "--no-default-features", "--features", "rustls"], check=True)
    return program


def report(text):
    """From the client's own JSON."""
    result = json.loads(text)
    codes = result["statusCodeDistribution"]
    ok = codes.get("200", 0)
    failed = sum(codes.values()) - ok + sum(result["errorDistribution"].values())
    return {"requests": ok, "errors": failed, "ttft_ms": result["latencyPercentiles"]["p50"] * 1e3}


def main():
    args = common.arguments(__doc__)
    program = install(args.work)
    print(common.run([program, "--version"]).strip())
    prompt = "word " * 40

    def load(interface):
        path = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}[interface]
        asked = {
            "completions": {"prompt": prompt},
            "chat": {"messages": [{"role": "user", "content": prompt}]},
        }[interface]

        def with_server(server, name):
            bodies = args.work / f"{name}.bodies.jsonl"
            lines = [
                json.dumps({"model": server.lora(n), **asked, "max_tokens": 1, "ignore_eos": True})
                for n in range(server.adapters)
            ]
            bodies.write_text("\n".join(lines) + "\n")
            return report(
                common.run(
                    [
                        program, "--no-tui", "--output-format", "json", "-n", args.requests, "-c", 4, "-q", args.rate,
                        "-m", "POST", "-T", "application/json", "-Z", bodies, server.url + path,
                    ]
                )
            )

        return with_server

    common.end([common.compare(args, "oha", i, load(i), args.requests) for i in args.interfaces])


if __name__ == "__main__":
    main()
