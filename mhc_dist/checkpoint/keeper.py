"""The checkpoints of a run as its training loop sees them: when to save, and how to go back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from mhc_dist.checkpoint.folder import FOLDER, committed
from mhc_dist.checkpoint.load import choose, from_first_rank, load, tidy
from mhc_dist.checkpoint.manifest import CheckpointError, Progress
from mhc_dist.checkpoint.outcome import SaveOutcome
from mhc_dist.checkpoint.resume import changes, check_same_run, is_of_run
from mhc_dist.checkpoint.save import ActionReport, Saver
from mhc_dist.checkpoint.state import RankState
from mhc_dist.config import RunConfig

START = Progress(step=0, num_updates=0, num_sequences=0, num_tokens=0)


@dataclass(frozen=True)
class Resumed:
    """Where the run stands now; `told` are sentences for the user."""

    progress: Progress
    told: tuple[str, ...] = ()


class CheckpointKeeper:
    """Saves when it is due and brings state back. All ranks call the same methods in the same order.

    group: gloo, all ranks, used by nothing else.
    corpus: fingerprint of the tokens.
    """

    def __init__(
        self,
        config: RunConfig,
        state: RankState,
        group: dist.ProcessGroup,
        corpus: str,
        report_action: ActionReport,
    ) -> None:
        self._config, self._state, self._group, self._corpus = config, state, group, corpus
        self._report_action = report_action
        self._rules = config.checkpoint
        self._folder: Path = config.folder
        self._saver = Saver(config, config.folder / FOLDER, state, group, corpus, report_action)
        self._saved_step: int | None = None
        """The step whose state is in the last checkpoint that was made, begun or loaded."""
        self._put_off = False

    def start(self) -> Resumed:
        """Start at step 0. Raises CheckpointError on all ranks where an earlier run left checkpoints."""

        def check() -> None:
            if found := committed(self._folder / FOLDER):
                raise CheckpointError(
                    f"{self._folder} has checkpoints of an earlier run, up to step {max(found)}. Continue it"
                    " with --resume auto, or set train.name to another name."
                )

        from_first_rank(check, self._group)
        return Resumed(START)

    def resume(self, request: str) -> Resumed:
        """Continue as `--resume` asks (`candidates`); from the start when `auto` finds no checkpoint.

        Raises CheckpointError on all ranks alike when that is not possible.
        """
        limit = self._rules.timeout_seconds
        self._report_action(f"verifying the checkpoint to resume from ({request})", may_take_seconds=limit)
        chosen = choose(request, self._folder, self._group)
        if chosen is None:
            told = tidy(self._folder, 0) if dist.get_rank(self._group) == 0 else []
            return Resumed(START, (*told, f"no checkpoint in {self._folder} yet: starting at step 0"))
        told = [f"{why}; trying the checkpoint before it" for _, why in chosen.passed_over]
        check_same_run(chosen.manifest, self._config, self._corpus, chosen.folder)
        self._report_action(f"loading {chosen.folder}", may_take_seconds=limit)
        load(chosen, self._state, self._group)
        progress = chosen.manifest.progress
        if dist.get_rank(self._group) == 0:
            damaged = tuple(folder for folder, _ in chosen.passed_over)
            told += tidy(self._folder, progress.step, damaged)
        self._saved_step = progress.step if is_of_run(chosen.folder, self._folder) else None
        changed = changes(chosen.manifest, self._config)
        told.append(f"resumed from step {progress.step} ({chosen.folder})")
        if changed:
            told.append(f"set differently since then: {', '.join(changed)}")
        return Resumed(progress, tuple(told))

    def after_step(self, progress: Progress, learning_rate: float, *, applied: bool) -> list[SaveOutcome]:
        """Save if it is due; saves that have ended since the last call.

        A step that was skipped is not saved: the state before it is no better to return to than the last
        checkpoint. The save is made up for after the next step that was applied.
        """
        ended = self._noted(self._saver.poll())
        every = self._rules.every_steps
        if self._rules.mode != "none" and every and progress.step % every == 0:
            self._put_off = True
        if self._put_off and applied:
            self._put_off = False
            if self._rules.mode == "async":
                ended += self._noted(self._saver.wait())
                self._saved_step = progress.step
                self._saver.begin(progress, learning_rate)
            else:
                self._saved_step = progress.step
                ended += self._noted(self._saver.save(progress, learning_rate))
        return ended

    def last(self, progress: Progress, learning_rate: float) -> list[SaveOutcome]:
        """Before the run ends: finish the save under way; save what is not saved yet, now."""
        if self._rules.mode == "none":
            return []
        ended = self._noted(self._saver.wait())
        if self._saved_step != progress.step:
            self._saved_step = progress.step
            ended += self._noted(self._saver.save(progress, learning_rate))
        return ended

    def roll_back(self, progress: Progress) -> tuple[Resumed | None, list[SaveOutcome]]:
        """Return to the last checkpoint that is in order, but not in the text: that goes on where it is.

        None when there is no checkpoint.
        """
        ended = self._noted(self._saver.wait())
        resumed = self.resume("auto")
        if resumed.progress.step == 0:
            return None, ended
        kept = resumed.progress.model_copy(update={"num_sequences": progress.num_sequences})
        self._put_off = False
        return Resumed(kept, resumed.told), ended

    def _noted(self, outcome: SaveOutcome | None) -> list[SaveOutcome]:
        if outcome is None:
            return []
        if outcome.failure is not None and outcome.step == self._saved_step:
            self._saved_step = None
        return [outcome]
