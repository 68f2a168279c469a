#!/usr/bin/env bash
# First result in one command: sets up .venv, prepares music, pretrains configs/tiny.py and draws its
# curves. `bash launch/quickstart.sh [--input=DIR] [--output=DIR]`; without --input, a few short CC0
# recordings that come with the checkout.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

input=launch/music
output=runs/quickstart
for argument in "$@"; do
    case "$argument" in
        --input=*) input=${argument#*=} ;;
        --output=*) output=${argument#*=} ;;
        *)
            echo "error: unknown option $argument; there are --input=DIR and --output=DIR" >&2
            exit 2
            ;;
    esac
done
if [ ! -e "$input" ]; then
    echo "error: --input=$input does not exist" >&2
    exit 2
fi

source launch/environment.sh
install test

echo "== 1. prepare: $input -> $output/data"
# small sets need more than the default 5 % held out to say anything
python -m mert_jax.prepare --input="$input" --output="$output/data" --validation_fraction=0.3
echo "== 2. train: configs/tiny.py -> $output/tiny"
python -m mert_jax.train --config=configs/tiny.py --workdir="$output/tiny" \
    --config.data.dir="$output/data"
echo "== 3. report: the curves"
python -m mert_jax.report --workdir="$output/tiny"
cat <<END

Done. The checkpoint is in $output/tiny/checkpoints, the curves in $output/tiny/report.html.
Next, with your own music:
    bash launch/quickstart.sh --input=/path/to/music --output=runs/mine
or step by step, with all settings (source .venv/bin/activate first):
    python -m mert_jax.prepare --input=/path/to/music --output=prepared
    python -m mert_jax.train --config=configs/base.py --workdir=runs/base --config.data.dir=prepared
END
