"""Hydra's multirun on Ray: `launcher=ray`. Ray itself is imported when jobs are launched."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from dense_heads.errors import UserError

# Hydra makes plugins by a name in `hydra_plugins` only; ours is entered under such a name, no package has it.
_NAME = "hydra_plugins.dense_heads.RayLauncher"


class RayLauncher(Launcher):
    """Each job is one task of Ray's; a job that fails, or whose process dies, leaves the others alone."""

    def __init__(self, init: Mapping[str, Any], remote: Mapping[str, Any]) -> None:
        """`init`: arguments of `ray.init`; `remote`: what one job takes, and other options of a task of Ray's."""
        self.init, self.remote = dict(init), dict(remote)
        self._set_up: tuple[HydraContext, TaskFunction, DictConfig] | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """What Hydra tells before it launches."""
        self._set_up = (hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs and wait for them; the results in the order of the jobs.

        Raises:
            UserError: Ray's cluster cannot be reached.
        """
        import ray as untyped

        ray: Any = untyped
        assert self._set_up is not None
        context, task_function, config = self._set_up
        setup_globals()
        configs = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            job = context.config_loader.load_sweep_config(config, list(overrides))
            with open_dict(job):
                job.hydra.job.id, job.hydra.job.num = f"job_{number}", number
            configs.append(job)
        try:
            ray.init(**{key: value for key, value in self.init.items() if value is not None})
        except (ConnectionError, ValueError, TypeError) as error:
            raise UserError(f"Ray cannot be started with {self.init}: {error}") from error
        try:
            options = {"num_gpus": float("GPU" in ray.cluster_resources()), "max_retries": 0}
            options |= {key: value for key, value in self.remote.items() if value is not None}
            task = ray.remote(_run).options(**options)
            state = Singleton.get_state()
            waiting = [task.remote(os.getcwd(), state, context, task_function, job) for job in configs]
            return [_result(ray, one, job) for one, job in zip(waiting, configs, strict=True)]
        finally:
            ray.shutdown()


def _run(
    folder: str,
    state: Mapping[type, Singleton],
    context: HydraContext,
    task_function: TaskFunction,
    config: DictConfig,
) -> JobReturn:
    """One job, in a process of Ray's."""
    if os.path.isdir(folder):
        os.chdir(folder)  # where relative paths were typed
    Singleton.set_state(state)
    setup_globals()
    return run_job(
        hydra_context=context,
        task_function=task_function,
        config=config,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _result(ray: Any, waiting: Any, job: DictConfig) -> JobReturn:
    try:
        result: JobReturn = ray.get(waiting)
        return result
    except ray.exceptions.RayError as error:  # its process is gone, for want of memory perhaps
        typed = " ".join(job.hydra.overrides.task)
        failed = JobReturn(status=JobStatus.FAILED)
        failed.return_value = UserError(f"Job {job.hydra.job.num} ({typed}) ended without a result: {error}")
        return failed


def register_launcher() -> None:
    """Make `hydra/launcher=ray` known to Hydra."""
    plugins = Plugins.instance()
    plugins.register(RayLauncher)
    plugins.class_name_to_class[_NAME] = RayLauncher
