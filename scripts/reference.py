#!/usr/bin/env python3
"""Makes a reference of a real size on a GPU: random weights, PEFT adapters, and their teacher-forced logits.

    python3 scripts/reference.py --shape llama-1b-like --out /tmp/reference
    python3 scripts/reference.py --shape llama-2-7b --layers 4 --dtype bfloat16 --device cuda --out /tmp/reference

Writes OUT/model and OUT/adapters/* as ordinary Hugging Face and PEFT folders, OUT/reference.json, which
says what is there and how far bfloat16 arithmetic alone is from float32, and OUT/reference.safetensors,
in the layout of tests/fixtures, for the base model and for each adapter:

  tokens.<who>   [len]          a teacher-forced sequence; lengths differ (37 to 600)
  logits.<who>   [kept, vocab]  logits at its last `kept` positions, as float32: the model run in --dtype
  exact.<who>    [kept, vocab]  the same weights run in float32: what `logits` is an approximation of
  prompt.<who>   [len]          a prompt
  greedy.<who>   [new]          its greedy continuation, in float32 (in --dtype with --no-exact)
  margin.<who>   [new]          logit of each greedy token less the second best

An engine that computes in bfloat16 is to be held to `exact`, and about as near to it as `logits` is.
Everything is computed with what was written, read back as a user would. Attention is transformers'
plain one, so that nothing depends on which fused kernel a card has; float32 is float32, not TF32.

Weights have the scale of trained networks, as far as random ones can: the residual grows by about
twice over all layers, attention picks a few positions out of many, logits have a standard deviation of
about 2, and an adapter changes each layer's output by about a third.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import PeftModel
from safetensors.torch import save_file

from peft_models import CLASSES, LINEAR, SHAPES, config_of, forced_logits, greedy, lora_config, tidy

BASE = "base"
# name, rank, alpha, rank-stabilised, length of the forced sequence and of the prompt
ADAPTERS = [
    ("a-r8", 8, 16, False, 37, 37),
    ("b-r16", 16, 16, False, 600, 61),
    ("c-r64", 64, 16, True, 301, 130),
    ("d-r5", 5, 10, False, 129, 48),
]
BASE_LENGTHS = (513, 96)
NEW_TOKENS = 12
LOGITS_STD = 2.0
# The standard deviation of attention scores: 1 would average all positions away, and with them any
# mistake in attention.
SCORE_STD = 2.25
# Of each adapter's effect, relative to its layer's own output.
ADAPTER_EFFECT = 0.33


class Draw:
    """Normal values on a device, from one seed."""

    def __init__(self, seed, device, dtype):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype

    def __call__(self, shape, std, mean=0.0):
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return (values * std + mean).to(self.dtype)

    def signs(self, shape):
        return torch.randint(2, shape, generator=self.generator, device=self.device).mul(2).sub(1)

    def tokens(self, count, vocab):
        return torch.randint(3, vocab, (count,), generator=self.generator, device=self.device)


def weight_std(name, shape, config):
    """Standard deviation of a matrix's values, so that what it gives has the size said above."""
    width, layers = shape[-1], config.num_hidden_layers
    embedded = 1.0
    if config.tie_word_embeddings:
        embedded = LOGITS_STD / config.hidden_size**0.5
    # Two additions a layer, which together make the residual's variance about four times as large.
    added = embedded * (1.5 / layers) ** 0.5
    if "embed" in name:
        return embedded
    last = name.rsplit(".", 2)[-2]
    if last == "lm_head":
        return LOGITS_STD / width**0.5
    if last in ("q_proj", "k_proj"):
        return (SCORE_STD / width) ** 0.5
    if last in ("o_proj", "out_proj"):
        # An average of a few positions is smaller than one.
        return 2.0 * added / width**0.5
    if last in ("down_proj", "fc2"):
        # The activation leaves 0.6 to 0.7 of a unit input.
        return 1.5 * added / width**0.5
    return 1 / width**0.5


def draw_model(family, config, draw):
    """Weights of the whole model, by name, on the device."""
    with torch.device("meta"):
        empty = CLASSES[family][1](config)
    weights = {}
    # Tied tensors come once.
    for name, parameter in empty.named_parameters():
        if parameter.dim() > 1:
            weights[name] = draw(parameter.shape, weight_std(name, parameter.shape, config))
        elif name.endswith("norm.weight"):
            weights[name] = draw(parameter.shape, 0.2, mean=1.0)
            if config.tie_word_embeddings and name == "model.decoder.final_layer_norm.weight":
                # Else the model repeats its last token: see scripts/make_fixtures.py.
                weights[name] *= draw.signs(parameter.shape)
        else:
            weights[name] = draw(parameter.shape, 0.1)
    return weights


def write_model(family, config, draw, folder):
    weights = draw_model(family, config, draw)
    config.architectures = [CLASSES[family][1].__name__]
    config.save_pretrained(folder)
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    tidy(folder, draw.dtype)
    return weights


def write_adapter(family, weights, draw, folder, rank, alpha, stabilised):
    """A PEFT folder that adapts every linear layer of every decoder layer."""
    config = lora_config(rank, alpha, stabilised, LINEAR[family])
    config.inference_mode = True
    config.save_pretrained(folder)
    scale = alpha / (rank**0.5 if stabilised else rank)
    tensors = {}
    for name, weight in weights.items():
        stem, _, kind = name.rpartition(".")
        if kind != "weight" or stem.rpartition(".")[2] not in LINEAR[family]:
            continue
        outputs, inputs = weight.shape
        own = weight.float().std().item() * inputs**0.5
        tensors[f"base_model.model.{stem}.lora_A.weight"] = draw((rank, inputs), inputs**-0.5)
        tensors[f"base_model.model.{stem}.lora_B.weight"] = draw(
            (outputs, rank), ADAPTER_EFFECT * own / scale / rank**0.5
        )
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    tidy(folder, draw.dtype)


class Models:
    """The base model in one type of arithmetic, and each adapter on it."""

    def __init__(self, family, out, dtype, device):
        self.out, self.dtype = out, dtype
        read = CLASSES[family][1].from_pretrained(out / "model", dtype=dtype, attn_implementation="eager")
        self.base = read.to(device).eval()

    def run(self, who, compute):
        """What `compute` gives for the model with adapter `who` on it, or with none."""
        if who == BASE:
            return compute(self.base)
        # By default peft computes adapters of a bfloat16 model in float32.
        keep = self.dtype != torch.float32
        adapted = PeftModel.from_pretrained(
            self.base, self.out / "adapters" / who, autocast_adapter_dtype=not keep
        ).eval()
        if keep:
            wrong = {p.dtype for n, p in adapted.named_parameters() if "lora_" in n} - {self.dtype}
            if wrong:
                sys.exit(f"peft read adapter {who} as {wrong} rather than as {self.dtype}")
        result = compute(adapted)
        self.base = adapted.unload()
        return result


def distance(got, want):
    """Error of logits: `‖got − want‖ / ‖want‖` over all, and the largest difference."""
    off = got - want
    return {
        "relative": (off.norm() / want.norm()).item(),
        "largest": off.abs().max().item(),
        "best_token_agrees": (got.argmax(-1) == want.argmax(-1)).float().mean().item(),
    }


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", required=True, choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="this many decoder layers instead of the shape's")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kept", type=int, default=64, help="positions whose logits are kept; 0 keeps all")
    parser.add_argument("--no-exact", action="store_true", help="no float32 run: it needs twice the model's memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True, type=Path, help="a folder to make; it must not exist or be empty")
    a = parser.parse_args()
    if a.out.exists() and (not a.out.is_dir() or any(a.out.iterdir())):
        parser.error(f"--out {a.out} exists and is not an empty folder: name another")
    if a.layers is not None and a.layers < 1:
        parser.error(f"--layers {a.layers}: at least 1")
    if a.kept < 0:
        parser.error(f"--kept {a.kept}: 0 for all, or how many")
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {a.device}: torch finds no such device here; --device cpu is slow and works")
    return a


def main():
    a = arguments()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    started = time.monotonic()
    note = lambda what: print(f"{time.monotonic() - started:6.1f} s  {what}", file=sys.stderr, flush=True)

    dtype = getattr(torch, a.dtype)
    draw = Draw(a.seed, a.device, dtype)
    family, config = config_of(a.shape, a.layers)
    longest = max(BASE_LENGTHS[0], *(row[4] for row in ADAPTERS))
    if longest > config.max_position_embeddings:
        sys.exit(f"{a.shape} has {config.max_position_embeddings} positions, fewer than {longest}")
    weights = write_model(family, config, draw, a.out / "model")
    for name, rank, alpha, stabilised, _, _ in ADAPTERS:
        write_adapter(family, weights, draw, a.out / "adapters" / name, rank, alpha, stabilised)
    parameters = sum(w.numel() for w in weights.values())
    del weights
    note(f"wrote a model of {parameters / 1e6:.0f} million parameters and {len(ADAPTERS)} adapters")

    lengths = {BASE: BASE_LENGTHS} | {row[0]: row[4:] for row in ADAPTERS}
    tokens = {who: draw.tokens(n, config.vocab_size) for who, (n, _) in lengths.items()}
    prompts = {who: draw.tokens(n, config.vocab_size) for who, (_, n) in lengths.items()}
    out, facts = {}, {}
    for who in lengths:
        out[f"tokens.{who}"], out[f"prompt.{who}"] = tokens[who].int(), prompts[who].int()

    passes = [("logits", dtype)] if a.no_exact else [("logits", dtype), ("exact", torch.float32)]
    for what, arithmetic in passes:
        models = Models(family, a.out, arithmetic, a.device)
        note(f"read the model as {arithmetic}")
        for who in lengths:
            out[f"{what}.{who}"] = models.run(who, lambda model: forced_logits(model, tokens[who], a.kept))
            if what == passes[-1][0]:
                new, margins = models.run(who, lambda model: greedy(model, prompts[who], NEW_TOKENS))
                out[f"greedy.{who}"], out[f"margin.{who}"] = new.int(), margins.float()
        note(f"computed {what}")
        del models

    for who in lengths:
        logits = out[f"logits.{who}"]
        facts[who] = {"length": lengths[who][0], "kept": len(logits), "logits_std": logits.std().item()}
        if not torch.isfinite(logits).all():
            sys.exit(f"the logits of {who} are not all finite")
        if not a.no_exact:
            facts[who]["from_exact"] = distance(logits, out[f"exact.{who}"])
    save_file({n: t.cpu().contiguous() for n, t in out.items()}, a.out / "reference.safetensors")
    (a.out / "reference.safetensors").chmod(0o644)
    summary = {
        "made_by": "scripts/reference.py",
        "shape": a.shape,
        "layers": config.num_hidden_layers,
        "parameters": parameters,
        "dtype": a.dtype,
        "seed": a.seed,
        "device": torch.cuda.get_device_name(a.device) if a.device.startswith("cuda") else a.device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "adapters": [{"name": n, "rank": r, "alpha": al, "rank_stabilised": s} for n, r, al, s, _, _ in ADAPTERS],
        "who": facts,
    }
    (a.out / "reference.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary["who"], indent=2))
    size = sum(p.stat().st_size for p in a.out.rglob("*") if p.is_file())
    note(f"{size / 1e6:.0f} MB in {a.out}")


if __name__ == "__main__":
    main()
