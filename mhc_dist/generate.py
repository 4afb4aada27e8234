"""Let a trained model continue a text, in one process on the CPU.

CKPT is a checkpoint, a run's folder (its newest checkpoint), or an export folder. The prompt is taken as the
beginning of a text of the corpus; the answer ends where the model ends that text, or after --max-tokens.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from mhc_dist.export.source import open_model, open_vocabulary
from mhc_dist.export.weights import build_model, whole_state
from mhc_dist.guard.exit_codes import ExitCode
from mhc_dist.model.decode import Decoder, generate

INTERRUPTED = 130
"""What shells show after Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mhc-dist generate", description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("prompt", metavar="PROMPT", help="how the text begins; may be empty")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="longest answer (200)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="equal seeds, equal answers (0)")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="tokenizer.json, where the corpus is elsewhere"
    )
    options = parser.parse_args(arguments)
    try:
        _check(options)
        _answer(options)
    except ValueError as error:
        print(f"mhc-dist: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except KeyboardInterrupt:
        print()  # the shell's prompt gets a line of its own
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has enough (`| head`); Python would complain about the rest when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.OK


def _check(options: argparse.Namespace) -> None:
    if options.max_tokens < 1:
        raise ValueError(f"--max-tokens {options.max_tokens}: at least 1 is needed")
    if not (math.isfinite(options.temperature) and options.temperature >= 0.0):
        raise ValueError(f"--temperature {options.temperature}: 0 or a finite number above it is needed")


def _answer(options: argparse.Namespace) -> None:
    config, weights, description = open_model(options.checkpoint)
    vocabulary = open_vocabulary(options.checkpoint, config, options.tokenizer)
    prompt = [vocabulary.separator, *vocabulary.encode(options.prompt)]
    largest = max(prompt)
    if largest >= config.model.vocab_size:
        raise ValueError(
            f"token {largest} of the prompt is none of the model's {config.model.vocab_size}: the tokenizer"
            " is not the one it was trained with"
        )
    print(f"{description}, {config.residual.kind}", file=sys.stderr)
    length = len(prompt) + options.max_tokens
    if length > config.data.sequence_length:
        print(
            f"the text may reach {length} tokens; the model was trained on {config.data.sequence_length}",
            file=sys.stderr,
        )
    decoder = Decoder(build_model(config, whole_state(weights, config)), config, capacity=length)
    generator = torch.Generator().manual_seed(options.seed)
    stream = vocabulary.stream()
    print(options.prompt, end="", flush=True)
    for token in generate(
        decoder, prompt, vocabulary.separator, options.max_tokens, options.temperature, generator
    ):
        print(stream.feed(token), end="", flush=True)
    print()


if __name__ == "__main__":
    sys.exit(main())
