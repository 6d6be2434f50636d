#!/usr/bin/env python3
"""Checks that every dependency may be used under a licence that deny.toml allows.

Reads `cargo metadata` and evaluates the SPDX expressions. It knows nothing of licence texts, which
cargo-deny compares too; it needs nothing but Python 3.11 and cargo.
"""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def allowed(expression: str, allow: set[str]) -> bool:
    """Evaluates `A OR (B AND C WITH D)`; the old form `A/B` means `A OR B`."""
    tokens = re.findall(r"\(|\)|[^\s()]+", expression.replace("/", " OR "))

    def either() -> bool:
        value = both()
        while tokens and tokens[0] == "OR":
            tokens.pop(0)
            value = both() or value
        return value

    def both() -> bool:
        value = one()
        while tokens and tokens[0] == "AND":
            tokens.pop(0)
            value = one() and value
        return value

    def one() -> bool:
        token = tokens.pop(0)
        if token == "(":
            value = either()
            if not tokens or tokens.pop(0) != ")":
                raise ValueError("unbalanced brackets")
            return value
        if tokens and tokens[0] == "WITH":
            tokens.pop(0)
            token = f"{token} WITH {tokens.pop(0)}"
        return token in allow

    value = either()
    if tokens:
        raise ValueError(f"left over: {' '.join(tokens)}")
    return value


def main() -> int:
    allow = set(tomllib.loads((ROOT / "deny.toml").read_text())["licenses"]["allow"])
    command = ["cargo", "metadata", "--format-version", "1", "--locked", "--all-features"]
    packages = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)["packages"]
    bad = []
    for package in packages:
        expression = package["license"]
        name = f"{package['name']} {package['version']}"
        try:
            if expression is None:
                bad.append(f"{name}: states no licence expression")
            elif not allowed(expression, allow):
                bad.append(f"{name}: {expression}")
        except (ValueError, IndexError) as error:
            bad.append(f"{name}: cannot read '{expression}' ({error})")
        if package["source"] is not None and not package["source"].startswith(("registry+", "sparse+")):
            bad.append(f"{name}: comes from {package['source']}, not from a registry")
    for line in bad:
        print(line, file=sys.stderr)
    print(f"licences: {len(packages)} packages, {len(bad)} not allowed by deny.toml")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
