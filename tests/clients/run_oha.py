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
    held = []
    prompt = "word " * 40
    for interface in args.interfaces:
        name = f"oha-{interface}"
        path = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}[interface]
        asked = {
            "completions": {"prompt": prompt},
            "chat": {"messages": [{"role": "user", "content": prompt}]},
        }[interface]
        with common.serving(args, name) as server:
            bodies = args.work / f"{name}.bodies.jsonl"
            lines = [
                json.dumps({"model": server.lora(n), **asked, "max_tokens": 1, "ignore_eos": True})
                for n in range(server.adapters)
            ]
            bodies.write_text("\n".join(lines) + "\n")
            text = common.run(
                [
                    program, "--no-tui", "--output-format", "json", "-n", args.requests, "-c", 4, "-q", args.rate,
                    "-m", "POST", "-T", "application/json", "-Z", bodies, server.url + path,
                ]
            )
            server_ms = server.stop()
        held.append(common.judge("oha", interface, report(text), server_ms, args.requests))
    common.end(held)


if __name__ == "__main__":
    main()
