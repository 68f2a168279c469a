"""The tasks by name."""

from mert_jax.errors import UserError
from mert_jax.tasks import made, marble, musdb18, nsynth, vocalset
from mert_jax.tasks.task import Task

TASKS = (*marble.TASKS, *musdb18.TASKS, *nsynth.TASKS, *vocalset.TASKS, *made.TASKS)
TABLE = {task.name: task for task in TASKS}


def get_task(name: str) -> Task:
    """Return the task called `name`, in any case. Raises UserError for an unknown name."""
    known = {key.lower(): task for key, task in TABLE.items()}
    if name.lower() not in known:
        raise UserError(f"unknown task {name!r}; there are {', '.join(sorted(TABLE))}")
    return known[name.lower()]
