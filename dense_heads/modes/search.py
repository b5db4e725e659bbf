"""The trials of a sweep that this process runs, among others that may run some too."""

import logging
import time
from dataclasses import dataclass, field

from hydra.core.hydra_config import HydraConfig
from optuna.study import Study
from optuna.trial import Trial, TrialState

from dense_heads.build.space import Space
from dense_heads.build.study import summary
from dense_heads.errors import user_error_in
from dense_heads.modes.trial import Trials
from dense_heads.modes.workers import is_orphan
from dense_heads.ops.locks import ProcessLock
from dense_heads.report.trials import Sweep, progress_line, write_sweep

log = logging.getLogger("dense_heads.sweep")


@dataclass
class Search:
    """A study, and who runs its trials here.

    Who runs a trial holds a lock in its folder. A trial that is under way and whose lock is free was left by a process
    that was killed: it is taken up before a new one is begun, with its own suggestions and from its own checkpoint.
    """

    study: Study
    space: Space
    trials: Trials
    total: int  # of trials, over all processes and starts
    score: str  # val/miou
    workers: int = 1
    keep_checkpoints: bool = False
    deadline: float | None = None  # on time.monotonic(): no trial is begun after it
    _claimed: ProcessLock | None = field(default=None, init=False)

    def run_one(self) -> bool:
        """Run a trial to its end; False where there is none to run now."""
        trial = None if self._is_over() else self._claim()
        if trial is None:
            return False
        self._run(trial)
        assert self._claimed is not None
        self._claimed.release()
        return True

    def found(self) -> Sweep:
        """All trials so far, written to the sweep's folder."""
        sweep = summary(self.study, self.score, self.total)
        write_sweep(self.trials.folder, sweep)
        return sweep

    def _is_over(self) -> bool:
        return is_orphan() or (self.deadline is not None and time.monotonic() > self.deadline)

    def _claim(self) -> Trial | None:
        with ProcessLock(self.trials.folder / ".ask.lock"):  # one process at a time suggests
            every = self.study.get_trials(deepcopy=False)
            under_way = (trial for trial in every if trial.state == TrialState.RUNNING)
            left = next((trial for trial in under_way if self._take(trial.number)), None)
            if left is not None:
                log.info("trial %d goes on", left.number)
                trial = Trial(self.study, left._trial_id)  # Optuna has no other way to go on with one
            elif len(every) < self.total:
                trial = self.study.ask()
                self._take(trial.number)
            else:
                return None
            self.space.suggest(trial)
            return trial

    def _take(self, number: int) -> bool:
        lock = ProcessLock(self.trials.folder_of(number) / ".lock")
        if lock.acquire(wait=False):
            self._claimed = lock
            return True
        return False

    def _run(self, trial: Trial) -> None:
        heard = set(self.study.get_trials(deepcopy=False)[trial.number].intermediate_values)
        started = time.monotonic()

        def report(step: int, score: float) -> bool:
            if step not in heard:
                heard.add(step)
                trial.report(score, step)
            return trial.should_prune()

        value, state = None, TrialState.COMPLETE
        try:
            value = self.trials.run(trial.number, self.space.overrides(trial.params), report)
            if value is None:
                state = TrialState.PRUNED
        except Exception as error:
            known = user_error_in(error)
            full_disk = known is None and isinstance(error, OSError)  # or the like: no fault of the trial's, it stays
            if full_disk or HydraConfig.get().runtime.choices.get("debug") == "traceback":
                raise
            state = TrialState.FAIL
            trial.set_user_attr("error", str(known) if known else f"{type(error).__name__}: {error}")
        trial.set_user_attr("seconds", round(time.monotonic() - started, 1))
        self.study.tell(trial, value, state)
        if state != TrialState.FAIL and not self.keep_checkpoints:
            self.trials.clear(trial.number)
        log.info(progress_line(self.found(), trial.number, self.workers))
