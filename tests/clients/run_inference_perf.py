"""`inference-perf` against `serve`: python tests/clients/run_inference_perf.py [--work DIR] [--program FILE]"""

import json

import common


def config(args, server, interface, tokenizer, folder):
    """Its configuration; JSON is YAML."""
    seconds = max(1, round(args.requests / args.rate))
    share = 1 / server.adapters
    lengths = {"type": "fixed", "total_count": args.requests + 1}
    return {
        "api": {"type": {"completions": "completion", "chat": "chat"}[interface], "streaming": True},
        "data": {
            "type": "random",
            "input_distribution": {**lengths, "min": 200, "max": 200, "mean": 200, "std_dev": 0},
            "output_distribution": {**lengths, "min": 8, "max": 8, "mean": 8, "std_dev": 0},
        },
        "load": {
            "type": "poisson",
            "stages": [{"rate": args.rate, "duration": seconds}],
            "num_workers": 1,
            "base_seed": 1,
            "lora_traffic_split": [
                {"name": server.lora(n), "split": share} for n in range(server.adapters)
            ],
        },
        "server": {"type": "vllm", "model_name": server.models[0], "base_url": server.url, "ignore_eos": True},
        "tokenizer": {"pretrained_model_name_or_path": str(tokenizer)},
        "report": {"request_lifecycle": {"summary": True, "per_stage": False, "per_request": False}},
        "storage": {"local_storage": {"path": str(folder)}},
    }


def main():
    args = common.arguments(__doc__)
    binaries = common.packages(args.work, "inference-perf", "inference-perf")
    tokenizer = common.tokenizer(args.work, binaries)
    held = []
    for interface in args.interfaces:
        name = f"inference-perf-{interface}"
        folder = args.work / name
        with common.serving(args, name) as server:
            path = args.work / f"{name}.yaml"
            path.write_text(json.dumps(config(args, server, interface, tokenizer, folder), indent=1))
            common.run([binaries / "inference-perf", "-c", path], env=common.offline())
            server_ms = server.stop()
        result = json.loads((folder / "summary_lifecycle_metrics.json").read_text())
        report = {
            "requests": result["successes"]["count"],
            "errors": result["failures"]["count"],
            "ttft_ms": result["successes"]["latency"]["time_to_first_token"]["median"] * 1e3,
        }
        # Its arrivals are drawn for the time, not for the number.
        held.append(common.judge("inference-perf", interface, report, server_ms, round(0.7 * args.requests)))
    common.end(held)


if __name__ == "__main__":
    main()
