"""What all bench commands have in common: options, a file in results/, figures as JSON on the last line."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhc_dist.bench.ended import RankEndedError
from mhc_dist.bench.result import shown_command, write_result
from mhc_dist.config import RunConfig, load_config
from mhc_dist.guard.exit_codes import ExitCode

DEFAULT_CONFIG = Path(__file__).resolve().parents[2] / "configs" / "bench.yaml"


@dataclass(frozen=True)
class Outcome:
    """What a bench found. stem: of the file it goes to. label: what kind of figures they are. table: for a
    reader in front of the terminal. replaces: a file that is superfluous once the figures are written."""

    stem: str
    label: str
    figures: dict[str, Any]
    table: str = ""
    replaces: Path | None = None


@dataclass(frozen=True)
class Bench:
    """One bench command. settings: replaces values of the configuration before `--set` does."""

    name: str
    description: str | None
    add_options: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[RunConfig, argparse.Namespace], Outcome]
    settings: Callable[[argparse.Namespace], Sequence[str]] = lambda options: ()

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Measure, write the file, print. What the user got wrong ends with code 2 and one line, a process
        that is gone with code 81, Ctrl-C and SIGTERM without a word: who sent it knows.
        """
        parser = argparse.ArgumentParser(
            prog=f"mhc-dist bench {self.name}",
            description=self.description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_options(parser)
        parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="(configs/bench.yaml)")
        parser.add_argument(
            "--set", action="append", default=[], metavar="KEY=VALUE", help="replace a value of it"
        )
        parser.add_argument(
            "--results", type=Path, default=Path("results"), help="folder for the figures (results)"
        )
        parser.add_argument("--json", action="store_true", help="print the figures alone")
        options = parser.parse_args(arguments)
        # SIGTERM as Ctrl-C: processes are ended and folders removed on the way out.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            config = load_config(options.config, [*self.settings(options), *options.set])
            outcome = self.measure(config, options)
        except ValueError as error:
            print(f"mhc-dist: {error}", file=sys.stderr)
            sys.exit(ExitCode.USAGE)
        except RankEndedError as error:
            print(f"mhc-dist: {error}", file=sys.stderr)
            sys.exit(ExitCode.PEER_DIED)
        except KeyboardInterrupt:
            sys.exit(128 + signal.SIGINT)
        finally:
            signal.signal(signal.SIGTERM, before)
        command = shown_command(self.name, arguments)
        path = write_result(outcome.stem, options.results, command, outcome.label, outcome.figures)
        if outcome.replaces is not None:
            outcome.replaces.unlink()
        if not options.json:
            print(f"{outcome.label}; written to {path}")
            if outcome.table:
                print(outcome.table)
        print(json.dumps(outcome.figures))
