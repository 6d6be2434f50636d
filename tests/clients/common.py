"""What the client scripts share: packages into a folder, a server, and the comparison of two reports.

Every script starts `lora-hbm serve`, lets one public client load it over completions and over chat with a mix
of adapters, and holds the client's own report against the server's decision log: no errors, and a median TTFT
within 2 ms. Only the standard library is used here; a client is installed where it is told to.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
import venv

HERE = pathlib.Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
# How far apart the client's and the server's median TTFT may be.
ALLOWED_MS = 2.0


def arguments(description):
    """The flags that every script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--program", type=pathlib.Path, default=REPOSITORY / "target/release/lora-hbm")
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("/tmp/lora-hbm-clients"),
                        help="folder for packages and results")
    parser.add_argument("--requests", type=int, default=200, help="of each run")
    parser.add_argument("--rate", type=float, default=20.0, help="requests a second, where the client has rates")
    parser.add_argument("--emulate", metavar="PROFILE", help="serve this profile's times [default: those of `tiny`, timed now]")
    parser.add_argument("--computed", action="store_true", help="compute `tiny` instead of emulating it")
    parser.add_argument("--only", choices=("completions", "chat"), help="one of the two interfaces")
    args = parser.parse_args()
    if not args.program.exists():
        parser.error(f"there is no program at {args.program}: cargo build --release, or give --program")
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.computed and not args.emulate:
        # On a small machine the client must have the cores: an engine that only waits leaves them to it.
        args.emulate = args.work / "tiny.json"
        if not args.emulate.exists():
            run([args.program, "-q", "calibrate", "--model", "tiny", "--seconds", "5", "-o", args.emulate])
    args.interfaces = (args.only,) if args.only else ("completions", "chat")
    return args


def packages(work, name, *requirements):
    """A virtual environment `work/name` with these packages; an existing one is taken as it is."""
    folder = work / name
    if not (folder / "installed").exists():
        print(f"installing {', '.join(requirements)} into {folder}", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin/pip", "install", "--quiet", *requirements], check=True)
        (folder / "installed").write_text("\n".join(requirements) + "\n")
    return folder / "bin"


def tokenizer(work, binaries):
    """A tokenizer folder for clients that must have one; `binaries` must have the package transformers."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        subprocess.run([binaries / "python", HERE / "make_model.py", "tokenizer", folder], check=True)
    return folder


class Server:
    """A running `lora-hbm serve` with 16 adapters and 4 slots, and what it decided."""

    adapters = 16

    def __init__(self, args, name, more=()):
        self.log = args.work / f"{name}.decisions.jsonl"
        self.log.unlink(missing_ok=True)
        command = [args.program, "serve", "--port", "0", "--total-loras", str(self.adapters), "--gpu-loras", "4",
                   "--decision-log", self.log]
        command += ["--emulate", args.emulate] if args.emulate else ["--model", "tiny"]
        self.process = subprocess.Popen([*map(str, command), *more], stderr=subprocess.PIPE, text=True)
        self.url = None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"serving on (http\S+)", line):
                self.url = found.group(1)
                break
        if self.url is None:
            raise SystemExit("the server did not start:\n" + "".join(said))
        # Read on, so that it never waits for a full pipe.
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as answer:
            self.models = [model["id"] for model in json.load(answer)["data"]]

    def lora(self, number):
        return f"lora-{number % self.adapters}"

    def stop(self):
        """Ends it and returns its TTFTs in ms, in the order of arrival."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        if status != 0:
            raise SystemExit(f"the server ended with status {status}")
        return ttfts(self.log)


@contextlib.contextmanager
def serving(args, name, more=()):
    """A server that is gone afterwards, whatever happens."""
    server = Server(args, name, more)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def ttfts(log):
    """From receipt to the end of the step that gave the first token, in ms, of every request in a decision log."""
    received, first = {}, {}
    with open(log, encoding="utf-8") as lines:
        next(lines)
        for line in lines:
            entry = json.loads(line)
            if entry["line"] == "arrive" and not entry.get("refused"):
                received[entry["id"]] = entry["received"]
            elif entry["line"] == "step":
                for seq in entry["seqs"]:
                    # [id, place, adapter and slot, start, len, decode, samples]
                    if seq[6]:
                        first.setdefault(seq[0], entry["done"])
    return [(first[i] - at) / 1e6 for i, at in received.items() if i in first]


def judge(client, interface, report, server_ms, sent):
    """Prints both sides; true if there was no error and the medians agree.

    `report`: the client's `requests`, `errors` and `ttft_ms` (its median). `sent`: how many the client was
    told to send. The server may have seen more (warm-up)."""
    server = statistics.median(server_ms) if server_ms else float("nan")
    apart = report["ttft_ms"] - server
    holds = report["errors"] == 0 and report["requests"] >= sent and abs(apart) <= ALLOWED_MS
    print(
        f"{'ok  ' if holds else 'FAIL'} {client} {interface}: {report['requests']} requests, {report['errors']} errors, "
        f"median TTFT {report['ttft_ms']:.2f} ms, server's {server:.2f} ms ({apart:+.2f}), server saw {len(server_ms)}",
        flush=True,
    )
    return holds


def run(command, **more):
    """A client, quiet unless it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **more)
    if done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
        raise SystemExit(f"{command[0]} ended with status {done.returncode}")
    return done.stdout


def offline():
    """The environment of a client that must not ask a hub for anything."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def end(held):
    """Exit status 1 unless all held."""
    sys.exit(0 if held and all(held) else 1)
