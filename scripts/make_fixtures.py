#!/usr/bin/env python3
"""Makes tests/fixtures/: small random models and adapters, and what transformers + peft compute with them.

    python3 -m venv /tmp/fixtures && /tmp/fixtures/bin/pip install torch transformers peft
    /tmp/fixtures/bin/python scripts/make_fixtures.py

A Llama (grouped queries, untied output) and an OPT, each with four adapters of different ranks on
every linear layer, are saved as ordinary Hugging Face and PEFT folders. reference.safetensors holds,
for the base model and for each adapter:

  tokens.<who>          [len]         a teacher-forced sequence
  logits.<who>          [len, vocab]  logits at each of its positions
  prompt.<who>          [len]         a prompt
  greedy.<who>          [new]         its greedy continuation
  margin.<who>          [new]         logit of each greedy token less the second best

All arithmetic is float32 on the CPU. Weights are drawn as float16 values, so that they can be stored
in half the room without changing what is computed.
"""

import json
import platform
import shutil
import sys
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

OUT = Path(__file__).resolve().parent.parent / "tests" / "fixtures"

# name, rank, alpha, rank-stabilised
ADAPTERS = [("a-r4", 4, 8, False), ("b-r8", 8, 8, False), ("c-r16", 16, 8, True), ("d-r2", 2, 4, False)]
BASE = "base"
FORCED = 41
PROMPTS = {BASE: 9, "a-r4": 17, "b-r8": 5, "c-r16": 23, "d-r2": 12}
NEW_TOKENS = 12

LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}


def models():
    yield "llama", LlamaForCausalLM(
        LlamaConfig(
            vocab_size=112,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    yield "opt", OPTForCausalLM(
        OPTConfig(
            vocab_size=96,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=96,
            dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


@torch.no_grad()
def randomise(module, generator, only=lambda name: True):
    """Values that make every part matter: far from zero, norms not all one, biases present."""
    for name, p in module.named_parameters():
        if not only(name):
            continue
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            noise = noise * 0.2 + (1.0 if name.endswith("norm.weight") else 0.0)
        elif "lora_" in name:
            noise = noise * (0.5 / p.shape[1] ** 0.5)
        elif "embed" in name:
            noise = noise * 0.8
        else:
            noise = noise * (1.2 / p.shape[1] ** 0.5)
        p.copy_(noise.half().float())


def save_half(model, folder):
    """Half-precision files; the values are halves already. The model itself stays float32."""
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        save_file({k: v.half().contiguous() for k, v in load_file(path).items()}, path, {"format": "pt"})
    for path in folder.glob("config.json"):
        config = json.loads(path.read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = "float16"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.glob("adapter_config.json"):
        config = json.loads(path.read_text())
        # A set: its order changes from run to run.
        config["target_modules"].sort()
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for extra in ["generation_config.json", "README.md"]:
        (folder / extra).unlink(missing_ok=True)


@torch.no_grad()
def reference(model, who, vocab, generator, out):
    draw = lambda n: torch.randint(3, vocab, (n,), generator=generator)
    tokens = draw(FORCED)
    out[f"tokens.{who}"] = tokens.int()
    out[f"logits.{who}"] = model(tokens[None]).logits[0].contiguous()
    ids = draw(PROMPTS[who])
    out[f"prompt.{who}"] = ids.int()
    margins = []
    for _ in range(NEW_TOKENS):
        best = model(ids[None]).logits[0, -1].topk(2)
        margins.append(best.values[0] - best.values[1])
        ids = torch.cat([ids, best.indices[:1]])
    out[f"greedy.{who}"] = ids[PROMPTS[who] :].int()
    out[f"margin.{who}"] = torch.stack(margins)


def make(family, model, seed):
    folder = OUT / family
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    model.tie_weights()
    model.eval()
    save_half(model, folder / "model")
    vocab = model.config.vocab_size
    out = {}
    reference(model, BASE, vocab, generator, out)
    for name, rank, alpha, stabilised in ADAPTERS:
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            use_rslora=stabilised,
            target_modules=LINEAR[family],
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        adapted = get_peft_model(model, config)
        randomise(adapted, generator, only=lambda n: "lora_" in n)
        save_half(adapted, folder / "adapters" / name)
        model = adapted.unload()
        # Computed with what was written, read back as a user would.
        reread = PeftModel.from_pretrained(model, folder / "adapters" / name).float().eval()
        reference(reread, name, vocab, generator, out)
        model = reread.unload()
    save_file(out, folder / "reference.safetensors")


def main():
    torch.set_num_threads(1)
    if OUT.exists():
        shutil.rmtree(OUT)
    for seed, (family, model) in enumerate(models()):
        make(family, model, seed)
    manifest = {
        "made_by": "scripts/make_fixtures.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "adapters": [
            {"name": n, "rank": r, "alpha": a, "rank_stabilised": s} for n, r, a, s in ADAPTERS
        ],
    }
    (OUT / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    for path in OUT.rglob("*.safetensors"):
        path.chmod(0o644)
    total = sum(p.stat().st_size for p in OUT.rglob("*") if p.is_file())
    print(f"{total} bytes in {OUT}")
    if total > 2_000_000:
        sys.exit("the fixtures are over 2 MB")


if __name__ == "__main__":
    main()
