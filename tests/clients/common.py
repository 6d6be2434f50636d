"""What the client scripts share: packages into a folder, a server, and the comparison of two reports.

Every script starts `lora-hbm serve`, lets one public client load it over completions and over chat with a mix
of adapters, and holds the client's own report against the server's decision log: no errors, and a median TTFT
within 2 ms. Before, the client loads a server that only waits, which tells what it adds itself. Only the standard library is used here; a client is installed where it is told to.
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
# What the server that only waits waits, about what `tiny` takes for these prompts.
WAIT_MS = 17


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
    parser.add_argument("--errors-only", action="store_true",
                        help="judge errors and counts, not times: for machines that have other things to do")
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


def version(binaries, package):
    """The installed version of a package, in words."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return f"{package} {run([binaries / 'python', '-c', code]).strip()}"


def tokenizer(work, binaries):
    """A tokenizer folder for clients that must have one; `binaries` must have the package transformers."""
    folder = work / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        subprocess.run([binaries / "python", HERE / "make_model.py", "tokenizer", folder], check=True)
    return folder


class Started:
    """A server of 16 adapters that a client is held against: a process that says where it serves."""

    adapters = 16

    def __init__(self, command):
        self.process = subprocess.Popen([str(part) for part in command], stderr=subprocess.PIPE, text=True)
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
        """Ends it and returns its TTFTs in ms."""
        self.process.send_signal(signal.SIGTERM)
        status = self.process.wait(60)
        if status != 0:
            raise SystemExit(f"the server ended with status {status}")
        return self.ttfts()

    def ttfts(self):
        raise NotImplementedError


class Server(Started):
    """`lora-hbm serve` with 4 slots, and what it decided."""

    def __init__(self, args, name):
        self.log = args.work / f"{name}.decisions.jsonl"
        self.log.unlink(missing_ok=True)
        command = [args.program, "serve", "--port", 0, "--total-loras", self.adapters, "--gpu-loras", 4]
        command += ["--decision-log", self.log]
        command += ["--emulate", args.emulate] if args.emulate else ["--model", "tiny"]
        super().__init__(command)

    def ttfts(self):
        return ttfts(self.log)


class Waiting(Started):
    """The server of `waiting.py`: what a client reports of it beyond its wait is the client's own."""

    def __init__(self, args, name):
        self.out = args.work / f"{name}.waited.json"
        super().__init__([sys.executable, HERE / "waiting.py", WAIT_MS, self.out])

    def ttfts(self):
        return json.loads(self.out.read_text())


@contextlib.contextmanager
def started(server):
    """A server that is gone afterwards, whatever happens."""
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()


def compare(args, client, interface, load, sent, what=""):
    """Lets `load(server, name)` drive both servers and judges its reports; true if all held.

    `load` returns the client's `requests`, `errors` and `ttft_ms` (its median). `sent`: how many requests the client
    was told to send. `what` tells several runs of an interface apart."""
    name = "-".join(filter(None, (client.split()[0], interface, what)))
    with started(Waiting(args, name)) as waiting:
        report = load(waiting, f"{name}-waiting")
        own = report["ttft_ms"] - statistics.median(waiting.stop())
    with started(Server(args, name)) as server:
        report = load(server, name)
        name = f"{client} {interface} {what}".strip()
        return judge(name, report, server.stop(), sent, own, args.errors_only)


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


def judge(name, report, server_ms, sent, own, errors_only=False):
    """Prints both sides; true if there was no error and the medians agree, or without a look at these.

    The server may have seen more requests than `sent` (warm-up). `own` is what the client adds, in ms, where the
    server only waits: it is printed, to tell whose a difference is, and excuses none."""
    server = statistics.median(server_ms) if server_ms else float("nan")
    apart = report["ttft_ms"] - server
    near = errors_only or abs(apart) <= ALLOWED_MS
    holds = report["errors"] == 0 and report["requests"] >= sent and near
    print(
        f"{'ok  ' if holds else 'FAIL'} {name}: {report['requests']} requests, {report['errors']} errors, "
        f"median TTFT {report['ttft_ms']:.2f} ms, server's {server:.2f} ms ({apart:+.2f}; client's own {own:+.2f}), "
        f"server saw {len(server_ms)}",
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
