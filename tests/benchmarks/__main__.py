"""All benchmarks: `python -m tests.benchmarks [--only=NAME,...] [--json=FILE]`.

Prints each row when it is measured and finally all rows as a table (`table`). --json writes them as
a list: name, peer, ours_s, peer_s, ours_range_s, peer_range_s, ratio (peer time over ours),
ours_mib, peer_mib, and further fields of single benchmarks.
"""

import functools
import json

from absl import flags

from mert_jax import cli, files
from mert_jax.errors import UserError
from tests.benchmarks import (
    cqt,
    extract,
    prepare,
    product,
    rvq_vae,
    step,
    stream,
    student,
    table,
    teachers,
)

BENCHMARKS = {
    "cqt_nnaudio": cqt.nnaudio_rows,
    "cqt_librosa": cqt.librosa_rows,
    "rvq_vae": rvq_vae.rows,
    "teachers": teachers.rows,
    "product": product.rows,
    "student_95m": functools.partial(student.rows, student.names("95m")),
    "student_330m": functools.partial(student.rows, student.names("330m")),
    "step": step.rows,
    "extract_5s": functools.partial(extract.rows, ("1x5s", "8x5s")),
    "extract_60s": functools.partial(extract.rows, ("1x60s", "8x60s")),
    "stream": stream.rows,
    "prepare": prepare.rows,
}

_ONLY = flags.DEFINE_list("only", None, "Names of benchmarks; all by default.")
_JSON = flags.DEFINE_string("json", None, "File for the rows.")


def main() -> None:
    """Run the chosen benchmarks; raises UserError for a name that is not one."""
    names = _ONLY.value or list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        raise UserError(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    rows = []
    for name in names:
        for row in BENCHMARKS[name]():
            print(table.markdown([row]).splitlines()[-1], flush=True)
            rows.append(row)
            if _JSON.value:
                with files.atomic_write(_JSON.value, replace=True) as path, open(path, "w") as f:
                    f.write(json.dumps(rows, indent=1) + "\n")
    print(table.markdown(rows))


if __name__ == "__main__":
    cli.run(main)
