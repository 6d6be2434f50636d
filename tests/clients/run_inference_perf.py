"""`inference-perf` against `serve`: python tests/clients/run_inference_perf.py [--work DIR] [--program FILE]"""

import itertools
import json

import common


def conversations(args, tokens=200):
    """A file in ShareGPT's shape: prompts of as many characters, answers of eight.

    Its own random prompts are for completions alone, and are made while it sends."""
    words = "the of and to in is it that was for on are with as his they be at one have this from or had by not but what all"
    letters = itertools.cycle(words.split())
    path = args.work / "conversations.json"
    with path.open("w", encoding="utf-8") as file:
        # A record a line, which the reader of this shape takes as well as a list.
        for _ in range(args.requests + 1):
            text = ""
            while len(text) < tokens:
                text += next(letters) + " "
            turns = [{"from": "human", "value": text[: tokens - 1] + "."}, {"from": "gpt", "value": "an answer"[:8]}]
            print(json.dumps({"conversations": turns}), file=file)
    return path


def config(args, server, interface, tokenizer, folder):
    """Its configuration; JSON is YAML."""
    seconds = max(1, round(args.requests / args.rate))
    share = 1 / server.adapters
    return {
        "api": {"type": {"completions": "completion", "chat": "chat"}[interface], "streaming": True},
        "data": {"type": "shareGPT", "path": str(conversations(args))},
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
    print(common.version(binaries, "inference-perf"))

    def load(interface):
        def with_server(server, name):
            folder = args.work / name
            path = args.work / f"{name}.yaml"
            path.write_text(json.dumps(config(args, server, interface, tokenizer, folder), indent=1))
            common.run([binaries / "inference-perf", "-c", path], env=common.offline())
            result = json.loads((folder / "summary_lifecycle_metrics.json").read_text())
            return {
                "requests": result["successes"]["count"],
                "errors": result["failures"]["count"],
                "ttft_ms": result["successes"]["latency"]["time_to_first_token"]["median"] * 1e3,
            }

        return with_server

    common.end([common.compare(args, "inference-perf", i, load(i), args.requests) for i in args.interfaces])


if __name__ == "__main__":
    main()
