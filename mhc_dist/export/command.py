"""Write a trained model in a format that other programs read.

CKPT is a checkpoint, a run's folder (its newest checkpoint), or an export folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mhc_dist.export.huggingface import write_huggingface
from mhc_dist.export.source import open_model, open_vocabulary
from mhc_dist.export.torch_file import write_torch
from mhc_dist.guard.exit_codes import ExitCode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist export", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument(
        "--to",
        choices=("hf", "torch"),
        required=True,
        help="hf: a folder in Hugging Face's DeepSeek layout; torch: one file with a state dict",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the weights (fp32)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, where the corpus is elsewhere"
    )
    options = parser.parse_args(arguments)
    try:
        return _export(options)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return ExitCode.USAGE


def _export(options: argparse.Namespace) -> int:
    if options.output.exists():  # said before anything large is read
        raise ValueError(f"{options.output} already exists. Remove it, or choose another --output.")
    config, weights, description = open_model(options.checkpoint)
    print(f"reading {description}")
    dtype = DTYPES[options.dtype]
    if options.to == "torch":
        write_torch(weights, config, options.output, dtype)
    else:
        vocabulary = open_vocabulary(options.checkpoint, config, options.tokenizer)
        write_huggingface(weights, config, vocabulary, options.output, dtype)
    files = sorted(options.output.iterdir())
    print(f"written to {options.output}: {', '.join(file.name for file in files)}")
    num_bytes = sum(file.stat().st_size for file in files)
    print(json.dumps({"output": str(options.output), "format": options.to, "num_bytes": num_bytes}))
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
