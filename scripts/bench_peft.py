#!/usr/bin/env python3
"""Times transformers + peft on a GPU, to have something to compare the engine with.

    python3 scripts/bench_peft.py --out peft.json
    python3 scripts/bench_peft.py --shape tiny --layers 1 --runs 2 --device cpu     # tries the script

Random bfloat16 weights of the shape are made on the device. Timed, without an adapter and with one of
rank 16 on every linear layer:

  prefill        one prompt of 256 to 4096 tokens, logits of the last position
  decode         one token of each of 1 and 16 sequences with 512 tokens each behind them, with a
                 preallocated cache and with one that grows; for 16 also with four adapters in the batch
  adapter load   into the tensors that the model computes with: as separate pinned tensors, as one pinned
                 buffer (a bare copy: no tensor of the model is filled), through peft from host memory
                 and from a folder

Each item is the median of up to 20 runs after 3 warm-up ones, in milliseconds, with quartiles: `wall_ms`
by the host's clock with the device idle at both ends, `device_ms` between two events. Ceilings are
measured in the same run; `floor_ms` is the least that they allow: products for prefill, reading all
weights for a decode, the bytes for a load. An item that fails says so in `error` and the rest goes on.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import DynamicCache, StaticCache

from peft_models import CLASSES, LINEAR, SHAPES, config_of, lora_config

PROMPTS = [256, 512, 1024, 2048, 4096]
CONTEXT = 512
BATCHES = [1, 16]
RANK = 16
RUNS, WARM_UPS = 20, 3
# One adapter of the model is called so by peft; the others are there for mixed batches.
NAMES = ["default", "second", "third", "fourth"]
MIB = 1 << 20


class Clock:
    """Medians and quartiles of repeated runs of something, until the whole program's time is up."""

    def __init__(self, device, limit_s, runs):
        self.cuda = device.startswith("cuda")
        self.runs = runs
        self.end = time.monotonic() + limit_s
        self.sync = torch.cuda.synchronize if self.cuda else lambda: None

    def check(self):
        if time.monotonic() > self.end:
            raise TimeoutError("skipped: --limit-s is over")

    def __call__(self, once, runs=None, most_s=8.0):
        """`once` is run up to `runs` times, fewer (five at least) if that takes longer than `most_s`."""
        runs = runs or self.runs
        self.check()
        for _ in range(WARM_UPS):
            once()
        wall, device, started = [], [], time.monotonic()
        while len(wall) < runs and (len(wall) < 5 or time.monotonic() - started < most_s):
            self.check()
            self.sync()
            if self.cuda:
                events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                events[0].record()
            at = time.perf_counter()
            once()
            if self.cuda:
                events[1].record()
            self.sync()
            wall.append((time.perf_counter() - at) * 1e3)
            if self.cuda:
                device.append(events[0].elapsed_time(events[1]))
        return {"runs": len(wall), "wall_ms": spread(wall), "device_ms": spread(device) if device else None}


def spread(values):
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "q1": low, "q3": high, "iqr": high - low}


class Bench:
    """The model, and the list of what was measured."""

    def __init__(self, args):
        self.args, self.device = args, args.device
        self.clock = Clock(args.device, args.limit_s, args.runs)
        self.started = time.monotonic()
        self.report = {"made_by": "scripts/bench_peft.py", "environment": environment(args), "ceilings": {}, "items": []}

    def item(self, facts, measure):
        """Records what `measure` gives, or why it gave nothing."""
        row = dict(facts)
        try:
            self.clock.check()
            row |= measure()
        except Exception as error:  # whatever it is, the other items are still worth having
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
        self.report["items"].append(row)
        self.save()
        told = row.get("error") or f"{row['wall_ms']['median']:.3f} ms"
        what = " ".join(str(v) for v in facts.values())
        print(f"{time.monotonic() - self.started:6.1f} s  {what}: {told}", file=sys.stderr, flush=True)
        gc.collect()
        if self.clock.cuda:
            torch.cuda.empty_cache()

    def save(self):
        text = json.dumps(self.report, indent=2) + "\n"
        if self.args.out:
            # Whole after every item, so that a run that is cut off has left what it had.
            partial = self.args.out.with_name(self.args.out.name + ".partial")
            partial.write_text(text)
            partial.replace(self.args.out)
        return text

    def ceiling(self, name, measure):
        try:
            self.clock.check()
            self.report["ceilings"][name] = measure()
        except Exception as error:  # as in `item`
            self.report["ceilings"][name] = None
            self.report["ceilings"][name + "_error"] = f"{type(error).__name__}: {error}".splitlines()[0][:500]

    def floor(self, ceiling, work):
        """Milliseconds that `work` takes at a ceiling (per second), if that was measured."""
        rate = self.report["ceilings"].get(ceiling)
        return {"floor_ms": work / rate * 1e3} if rate else {"floor_ms": None}

    def ceilings(self):
        seconds = lambda once: self.clock(once)["wall_ms" if not self.clock.cuda else "device_ms"]["median"] / 1e3
        small = not self.clock.cuda

        def products():
            n = 256 if small else 8192
            a, b = (torch.randn(n, n, device=self.device, dtype=torch.bfloat16) for _ in range(2))
            return 2 * n**3 / seconds(lambda: a @ b)

        def memory():
            count = (MIB if small else 1024 * MIB) // 2
            x = torch.randn(count, device=self.device, dtype=torch.bfloat16)
            y = torch.empty_like(x)
            # Read once and written once.
            return 2 * x.nbytes / seconds(lambda: y.copy_(x))

        def copies():
            x = torch.empty((1 if small else 256) * MIB, dtype=torch.uint8, pin_memory=self.clock.cuda)
            y = torch.empty_like(x, device=self.device)
            return x.nbytes / seconds(lambda: y.copy_(x, non_blocking=True))

        self.ceiling("products_flop_per_s", products)
        self.ceiling("memory_bytes_per_s", memory)
        self.ceiling("pinned_copy_bytes_per_s", copies)

    def make(self):
        family, config = config_of(self.args.shape, self.args.layers)
        config._attn_implementation = "sdpa"
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(self.device):
                model = CLASSES[family][1](config)
        finally:
            torch.set_default_dtype(before)
        self.family, self.config, self.model = family, config, model.eval()
        self.attention = model.config._attn_implementation
        layers = model.get_submodule("model.layers" if family == "llama" else "model.decoder.layers")
        self.layer_parameters = sum(p.numel() for p in layers.parameters())
        self.weight_bytes = 2 * (self.layer_parameters + config.vocab_size * config.hidden_size)
        self.report["model"] = {
            "shape": self.args.shape,
            "layers": config.num_hidden_layers,
            "parameters": sum(p.numel() for p in model.parameters()),
            "dtype": str(model.dtype),
            "attention": self.attention,
        }

    def tokens(self, batch, count):
        return torch.randint(3, self.config.vocab_size, (batch, count), device=self.device)

    def prefill(self, count):
        limit = self.config.max_position_embeddings
        if count > limit:
            raise ValueError(f"{count} tokens are more than the model's {limit} positions")
        ids = self.tokens(1, count)
        timed = self.clock(lambda: self.model(ids, use_cache=True, logits_to_keep=1))
        return timed | self.floor("products_flop_per_s", 2 * self.layer_parameters * count)

    def decode(self, batch, kind, mixed=False):
        # The cache grows by a token with each run, warm-up ones too: by 23 of 512 in all.
        room = CONTEXT + self.clock.runs + WARM_UPS + 1
        if kind == "static":
            cache = StaticCache(config=self.config, max_cache_len=room)
        else:
            cache = DynamicCache(config=self.config)
        extra = {"adapter_names": [NAMES[i % len(NAMES)] for i in range(batch)]} if mixed else {}
        run = lambda ids: self.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **extra)
        run(self.tokens(batch, CONTEXT))
        held = int(cache.get_seq_length())
        if held != CONTEXT:
            raise RuntimeError(f"the cache holds {held} tokens after {CONTEXT} were computed")
        ids = self.tokens(batch, 1)
        timed = self.clock(lambda: run(ids))
        return timed | self.floor("memory_bytes_per_s", self.weight_bytes)

    def compute(self, adapter):
        for count in PROMPTS:
            facts = {"item": "prefill", "adapter": adapter, "batch": 1, "tokens": count}
            self.item(facts, lambda: self.prefill(count))
        for batch in BATCHES:
            for kind in ["static", "dynamic"]:
                facts = {"item": "decode", "adapter": adapter, "batch": batch, "context": CONTEXT, "cache": kind}
                self.item(facts, lambda: self.decode(batch, kind))

    def adapt(self):
        """Puts an adapter on the model, computed in the model's own type (peft would use float32)."""
        config = lora_config(RANK, 2 * RANK, False, LINEAR[self.family])
        self.model = get_peft_model(self.model, config, autocast_adapter_dtype=False).eval()
        self.fill("default")

    def fill(self, name):
        count = 0
        for parameter_name, parameter in self.model.named_parameters():
            if f".lora_A.{name}." in parameter_name or f".lora_B.{name}." in parameter_name:
                # New adapters are float32 on the host, whatever the model is.
                parameter.data = parameter.data.to(self.device, torch.bfloat16)
                parameter.normal_(std=0.01)
                count += parameter.numel()
        if count == 0:
            raise RuntimeError(f"peft's model has no tensors of adapter {name}")
        self.report["model"]["adapter_parameters"] = count

    def adapt_more(self):
        config = lora_config(RANK, 2 * RANK, False, LINEAR[self.family])
        for name in NAMES[1:]:
            self.model.add_adapter(name, config, autocast_adapter_dtype=False)
            self.fill(name)

    def mixed(self):
        batch = max(BATCHES)
        for kind in ["static", "dynamic"]:
            facts = {"item": "decode", "adapter": "four in the batch", "batch": batch, "context": CONTEXT, "cache": kind}
            self.item(facts, lambda: self.decode(batch, kind, mixed=True))

    def loads(self):
        slots = [p for n, p in self.model.named_parameters() if ".lora_" in n and ".default." in n]
        size = sum(p.nbytes for p in slots)
        facts = lambda how: {"item": "adapter load", "how": how, "bytes": size, "tensors": len(slots)}
        floor = self.floor("pinned_copy_bytes_per_s", size)
        pin = self.clock.cuda

        def separate():
            host = [torch.randn(p.shape, dtype=p.dtype, pin_memory=pin) for p in slots]

            def once():
                for slot, values in zip(slots, host):
                    slot.data.copy_(values, non_blocking=True)

            return self.clock(once) | floor

        def slab():
            host = torch.empty(size, dtype=torch.uint8, pin_memory=pin)
            slot = torch.empty(size, dtype=torch.uint8, device=self.device)
            return self.clock(lambda: slot.copy_(host, non_blocking=True)) | floor

        def through_peft():
            host = {n: t.cpu() for n, t in get_peft_model_state_dict(self.model, adapter_name="default").items()}
            return self.clock(lambda: set_peft_model_state_dict(self.model, host, adapter_name="default")) | floor

        def from_folder():
            with tempfile.TemporaryDirectory() as folder:
                self.model.save_pretrained(folder, selected_adapters=["default"])

                def once():
                    self.model.load_adapter(folder, "loaded", autocast_adapter_dtype=False)
                    self.model.delete_adapter("loaded")

                return self.clock(once, runs=5) | floor

        self.item(facts("separate pinned tensors"), separate)
        self.item(facts("one pinned buffer"), slab)
        self.item(facts("set_peft_model_state_dict, pageable"), through_peft)
        self.item(facts("load_adapter from a folder, and delete_adapter"), from_folder)

    def stage(self, name, run):
        """A part that others depend on: its failure is recorded as an item and told to the caller."""
        try:
            run()
            return True
        except Exception as error:  # as in `item`
            text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            self.report["items"].append({"item": name, "error": text})
            print(f"{name}: {text}", file=sys.stderr, flush=True)
            return False

    def run(self):
        # peft replaces parts of the model, which it could not do with tensors made in inference mode.
        with torch.no_grad():
            self.ceilings()
            if self.stage("make the model", self.make):
                with torch.inference_mode():
                    self.compute("none")
                if self.stage("put an adapter on", self.adapt):
                    with torch.inference_mode():
                        self.compute("one")
                    self.loads()
                    if self.stage("put more adapters on", self.adapt_more):
                        with torch.inference_mode():
                            self.mixed()
        self.report["seconds"] = time.monotonic() - self.started
        return self.save()


def environment(args):
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": args.device,
    }
    if not args.device.startswith("cuda"):
        return facts | {"card": None}
    card = torch.cuda.get_device_properties(args.device)
    uuid = str(card.uuid)
    facts |= {"card": card.name, "uuid": uuid if uuid.startswith("GPU-") else f"GPU-{uuid}", "memory_bytes": card.total_memory}
    query = ["nvidia-smi", f"--id={facts['uuid']}", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    try:
        text = subprocess.run(query, check=True, capture_output=True, text=True, timeout=30).stdout.strip()
        facts |= dict(zip(["driver", "largest_sm_clock", "power_limit"], (part.strip() for part in text.split(","))))
    except (OSError, subprocess.SubprocessError) as error:
        facts |= {"driver": None, "driver_error": str(error)[:300]}
    return facts


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="llama-2-7b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="this many decoder layers instead of the shape's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit-s", type=float, default=240.0, help="items that have not begun by then are skipped")
    parser.add_argument("--runs", type=int, default=RUNS, help="how many runs an item's median is of, at most")
    parser.add_argument("--out", type=Path, help="a file for the JSON that goes to standard output otherwise")
    a = parser.parse_args()
    if a.layers is not None and a.layers < 1:
        parser.error(f"--layers {a.layers}: at least 1")
    if a.runs < 2:
        parser.error(f"--runs {a.runs}: quartiles need at least 2")
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {a.device}: torch finds no such device here")
    return a


def main():
    args = arguments()
    bench = Bench(args)
    text = bench.run()
    if not args.out:
        sys.stdout.write(text)
    failed = [row for row in bench.report["items"] if "error" in row]
    if failed:
        print(f"{len(failed)} of {len(bench.report['items'])} items failed", file=sys.stderr)
    # With nothing measured at all there is no result.
    sys.exit(1 if len(failed) == len(bench.report["items"]) else 0)


if __name__ == "__main__":
    main()
