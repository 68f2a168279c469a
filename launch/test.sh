#!/usr/bin/env bash
# Sets up .venv and runs the linter and the tests: `bash launch/test.sh [--with-peers] [PYTEST_ARGS]`.
# --with-peers adds the comparisons with PyTorch's libraries; `-m hours` runs only the tests that take
# more than ten minutes each.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

extras=(test)
selection=(-m "not slow and not hours and not peers")
if [ "${1:-}" = --with-peers ]; then
    shift
    extras+=(peers)
    selection=(-m "not slow and not hours")
fi
source launch/environment.sh
install "${extras[@]}"

ruff check .
ruff format --check .
# one worker per file: XLA compiles on one core, and fixtures are shared within a file
exec python -m pytest -n auto --dist loadfile "${selection[@]}" "$@"
