"""Writes PEFT folders of random adapters for the built-in `tiny` model, to try adapters of one's own with.

    pip install numpy safetensors
    python scripts/tiny_adapters.py my-adapters support-bot:8 sql:16 french:4      # NAME:RANK
"""

import json
import pathlib
import sys

import numpy
from safetensors.numpy import save_file

LAYERS, HIDDEN, QUERY = 3, 256, 128


def main(folder: str, *adapters: str) -> None:
    for number, adapter in enumerate(adapters):
        name, rank = adapter.split(":")
        rank = int(rank)
        rng = numpy.random.default_rng(number)
        tensors = {}
        for layer in range(LAYERS):
            stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
            for half, shape in ("lora_A", (rank, HIDDEN)), ("lora_B", (QUERY, rank)):
                tensors[f"{stem}.{half}.weight"] = rng.normal(0, 0.1, shape).astype(numpy.float32)
        path = pathlib.Path(folder, name)
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": ["q_proj"],
            "bias": "none",
        }
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
        save_file(tensors, path / "adapter_model.safetensors")
        print(path)


if __name__ == "__main__":
    main(*sys.argv[1:])
