"""What the scripts that compute with transformers and peft share: modules, adapters, shapes, references."""

import json
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

ROOT = Path(__file__).resolve().parent.parent

LINEAR = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "opt": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
"""The linear layers of a decoder layer, which are what an adapter can adapt, by family."""

CLASSES = {"llama": (LlamaConfig, LlamaForCausalLM), "opt": (OPTConfig, OPTForCausalLM)}

SHAPES = {
    "llama-2-7b": json.loads((ROOT / "configs/models/llama-2-7b.json").read_text()),
    "opt-125m": json.loads((ROOT / "configs/models/opt-125m.json").read_text()),
    # Wide enough for every kernel's real tiles, with grouped queries, and small enough to be made,
    # run in float32 and read back in a minute.
    "llama-1b-like": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    # For trying the scripts themselves on a CPU.
    "tiny": json.loads((ROOT / "configs/models/tiny.json").read_text()),
}
"""`config.json` of each shape that --shape names; those of configs/models are the program's own."""


def config_of(shape, layers=None):
    """Family and transformers config of a shape, with another number of layers if one is given."""
    raw = dict(SHAPES[shape])
    family = raw.pop("model_type")
    raw.pop("architectures", None)
    raw["dtype"] = raw.pop("torch_dtype", "bfloat16")
    if layers is not None:
        raw["num_hidden_layers"] = layers
    if family == "opt":
        raw |= {"dropout": 0.0, "pad_token_id": 1}
    return family, CLASSES[family][0](**raw)


def lora_config(rank, alpha, stabilised, modules):
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=stabilised,
        target_modules=modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def save_as(model, folder, dtype):
    """Saves a model or an adapter, its tensors as `dtype`; the model itself stays as it is."""
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    tidy(folder, dtype)


def tidy(folder, dtype):
    """Makes what transformers and peft wrote the same from run to run, and says the type of the tensors."""
    for path in folder.glob("config.json"):
        config = json.loads(path.read_text())
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for path in folder.glob("adapter_config.json"):
        config = json.loads(path.read_text())
        # A set, where it is no pattern: its order changes from run to run.
        if isinstance(config["target_modules"], list):
            config["target_modules"].sort()
        # Where the base model lay when the adapter was made, which is nobody's business.
        config["base_model_name_or_path"] = None
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for extra in ["generation_config.json", "README.md"]:
        (folder / extra).unlink(missing_ok=True)
    # safetensors writes files that only their owner can read.
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)


@torch.no_grad()
def forced_logits(model, tokens, kept=None):
    """`[kept, vocab]` float32: logits at the last `kept` positions (all of them if none is given) of `tokens` `[len]`."""
    logits = model(tokens[None], logits_to_keep=kept or 0, use_cache=False).logits[0]
    return logits.float().contiguous()


@torch.no_grad()
def greedy(model, prompt, new):
    """The greedy continuation of `prompt` by `new` tokens, and each one's logit less the second best."""
    ids, margins = prompt, []
    for _ in range(new):
        best = forced_logits(model, ids, 1)[-1].topk(2)
        margins.append(best.values[0] - best.values[1])
        ids = torch.cat([ids, best.indices[:1]])
    return ids[len(prompt) :], torch.stack(margins)
