"""All benchmarks: `python -m tests.benchmarks [--only=NAME,...] [--json=FILE]`.

Prints a row for each and, with --json, writes them as a list: name, peer, ours_s, peer_s, ratio
(peer time over ours), ours_mib, peer_mib.
"""

import json

from absl import flags

from mert_jax import cli
from tests.benchmarks import cqt, extract, prepare, rvq_vae, step, stream, student, teachers

BENCHMARKS = {
    "cqt_nnaudio": cqt.nnaudio_rows,
    "cqt_librosa": cqt.librosa_rows,
    "rvq_vae": rvq_vae.rows,
    "teachers": teachers.rows,
    "student": student.rows,
    "step": step.rows,
    "extract": extract.rows,
    "stream": stream.rows,
    "prepare": prepare.rows,
}

_ONLY = flags.DEFINE_list("only", None, "Names of benchmarks; all by default.")
_JSON = flags.DEFINE_string("json", None, "File for the rows.")


def main() -> None:
    """Run the chosen benchmarks; raises UserError for a name that is not one."""
    names = _ONLY.value or list(BENCHMARKS)
    if unknown := sorted(set(names) - set(BENCHMARKS)):
        raise cli.UserError(f"unknown benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    rows = []
    for name in names:
        for row in BENCHMARKS[name]():
            print(
                f"{row['name']:10} {row['ours_s']:.4g} s, {row['peer']} {row['peer_s']:.4g} s: "
                f"{row['ratio']:.2f}x; {row['ours_mib']:.0f} MiB, {row['peer_mib']:.0f} MiB",
                flush=True,
            )
            rows.append(row)
    if _JSON.value:
        with open(_JSON.value, "w") as f:
            json.dump(rows, f, indent=1)


if __name__ == "__main__":
    cli.run(main)
