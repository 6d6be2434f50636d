#!/usr/bin/env python3
"""Makes tests/fixtures/: small random models and adapters, and what transformers + peft compute with them.

    python3 -m venv /tmp/fixtures && /tmp/fixtures/bin/pip install torch transformers peft
    /tmp/fixtures/bin/python scripts/make_fixtures.py

A Llama (grouped queries, untied output, heads wider than the hidden size) and an OPT, each with four
adapters of different ranks, are saved as ordinary Hugging Face and PEFT folders. Three adapt every
linear layer and one leaves some alone. The shapes are the smallest that the CUDA kernels take too:
heads of 64 and of 32, widths that are multiples of 8. reference.safetensors holds, for the base model
and for each adapter:

  tokens.<who>          [len]         a teacher-forced sequence
  logits.<who>          [len, vocab]  logits at each of its positions
  prompt.<who>          [len]         a prompt
  greedy.<who>          [new]         its greedy continuation
  margin.<who>          [new]         logit of each greedy token less the second best

llama/patterns holds two adapters more, whose modules are named by a pattern or all at once and have ranks
and alphas of their own, with tokens and logits alone.

All arithmetic is float32 on the CPU. Weights are drawn as bfloat16 values, so that they are stored in
half the room and a GPU, which keeps them in bfloat16, holds the very same numbers. scripts/reference.py makes references of real
sizes, in the same layout, on a GPU.
"""

import json
import platform
import shutil
import sys

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from peft_models import LINEAR, ROOT, forced_logits, greedy, lora_config, save_as

OUT = ROOT / "tests" / "fixtures"

# name, rank, alpha, rank-stabilised, modules that it leaves alone in either family
ADAPTERS = [
    ("a-r4", 4, 8, False, []),
    ("b-r8", 8, 8, False, ["k_proj", "o_proj", "up_proj", "fc1"]),
    ("c-r16", 16, 8, True, []),
    ("d-r3", 3, 4, False, []),
]
# Adapters whose modules are named by a pattern or all at once and have ranks and alphas of their own.
PATTERNS = {
    "all": {"r": 2, "lora_alpha": 4, "use_rslora": True, "target_modules": "all-linear"},
    "pattern": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": r".*\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.(?!up).*_proj)",
        "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.down_proj": 12},
        # Of those that match, the first counts; PEFT sorts them when it saves.
        "alpha_pattern": {"v_proj": 4, r"layers\.1\..*": 24},
    },
}
BASE = "base"
FORCED = 41
PROMPTS = {BASE: 9, "a-r4": 17, "b-r8": 5, "c-r16": 23, "d-r3": 12}
NEW_TOKENS = 12
# Prompts are drawn until no step of the continuation is closer than this: far more than float32 needs,
# and room for most of what bfloat16 does to logits of this size.
LEAST_MARGIN = 0.05
TRIES = 200


def models():
    yield "llama", LlamaForCausalLM(
        LlamaConfig(
            vocab_size=112,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=64,
            max_position_embeddings=128,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    yield "opt", OPTForCausalLM(
        OPTConfig(
            vocab_size=96,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=96,
            dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


@torch.no_grad()
def randomise(module, generator, only=lambda name: True):
    """Values that make every part matter: far from zero, norms not all one, biases present. Layers add less to
    the residual stream than it holds, as in trained models: else bfloat16 loses 2 % of the logits in two layers."""
    for name, p in module.named_parameters():
        if not only(name):
            continue
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() == 1:
            noise = noise * 0.2 + (1.0 if name.endswith("norm.weight") else 0.0)
            if name == "model.decoder.final_layer_norm.weight":
                # The output is tied to the embedding, and a residual holds its token's embedding:
                # without flipped signs in between, a model repeats its last token for ever.
                noise = noise * torch.randint(2, p.shape, generator=generator).mul(2).sub(1)
        elif "lora_" in name:
            noise = noise * (0.35 / p.shape[1] ** 0.5)
        elif "embed" not in name:
            noise = noise * (0.8 / p.shape[1] ** 0.5)
        p.copy_(noise.bfloat16().float())


def reference(model, who, vocab, generator, out):
    draw = lambda n: torch.randint(3, vocab, (n,), generator=generator)
    tokens = draw(FORCED)
    out[f"tokens.{who}"] = tokens.int()
    out[f"logits.{who}"] = forced_logits(model, tokens)
    for _ in range(TRIES):
        prompt = draw(PROMPTS[who])
        new, margins = greedy(model, prompt, NEW_TOKENS)
        if margins.min() >= LEAST_MARGIN:
            break
    else:
        sys.exit(f"{who}: no prompt of {TRIES} keeps the two best tokens {LEAST_MARGIN} apart: take another seed")
    out[f"prompt.{who}"] = prompt.int()
    out[f"greedy.{who}"] = new.int()
    out[f"margin.{who}"] = margins


def make(family, model, seed):
    folder = OUT / family
    generator = torch.Generator().manual_seed(seed)
    randomise(model, generator)
    model.tie_weights()
    model.eval()
    save_as(model, folder / "model", torch.bfloat16)
    vocab = model.config.vocab_size
    out = {}
    reference(model, BASE, vocab, generator, out)
    for name, rank, alpha, stabilised, left_out in ADAPTERS:
        modules = [module for module in LINEAR[family] if module not in left_out]
        adapted = get_peft_model(model, lora_config(rank, alpha, stabilised, modules))
        randomise(adapted, generator, only=lambda n: "lora_" in n)
        save_as(adapted, folder / "adapters" / name, torch.bfloat16)
        model = adapted.unload()
        # Computed with what was written, read back as a user would.
        reread = PeftModel.from_pretrained(model, folder / "adapters" / name).float().eval()
        reference(reread, name, vocab, generator, out)
        model = reread.unload()
    save_file(out, folder / "reference.safetensors")
    (folder / "reference.safetensors").chmod(0o644)
    return model


def make_patterns(model, folder):
    """Adapters of PATTERNS on the Llama model that was made before, and logits of each."""
    generator = torch.Generator().manual_seed(7)
    out = {}
    for name, fields in PATTERNS.items():
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **fields))
        randomise(adapted, generator, only=lambda n: "lora_" in n)
        save_as(adapted, folder / name, torch.bfloat16)
        model = adapted.unload()
        reread = PeftModel.from_pretrained(model, folder / name).float().eval()
        tokens = torch.randint(3, model.config.vocab_size, (FORCED,), generator=generator)
        out[f"tokens.{name}"] = tokens.int()
        out[f"logits.{name}"] = forced_logits(reread, tokens)
        model = reread.unload()
    save_file(out, folder / "reference.safetensors")
    (folder / "reference.safetensors").chmod(0o644)


def main():
    torch.set_num_threads(1)
    if OUT.exists():
        shutil.rmtree(OUT)
    for seed, (family, model) in enumerate(models()):
        model = make(family, model, seed)
        if family == "llama":
            make_patterns(model, OUT / family / "patterns")
    manifest = {
        "made_by": "scripts/make_fixtures.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "adapters": [
            {"name": n, "rank": r, "alpha": a, "rank_stabilised": s, "leaves_alone": l}
            for n, r, a, s, l in ADAPTERS
        ],
    }
    (OUT / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    total = sum(p.stat().st_size for p in OUT.rglob("*") if p.is_file())
    print(f"{total} bytes in {OUT}")
    if total > 2_000_000:
        sys.exit("the fixtures are over 2 MB")


if __name__ == "__main__":
    main()
