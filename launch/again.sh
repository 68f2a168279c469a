#!/usr/bin/env bash
# Repeats a command while its exit code asks for it: `bash launch/again.sh python -m mert_jax.train ...`.
# These codes are 75 (preempted, stalled, or another host stopped) and those of a crash or kill (134,
# 137, 139); any other code is passed on. SIGTERM and SIGINT are forwarded and end the repetition.
set -uo pipefail

if [ $# -eq 0 ]; then
    echo "error: no command given; such as: bash launch/again.sh python -m mert_jax.train ..." >&2
    exit 2
fi

child=
asked= # the signal received
handed=
hand_down() {
    asked=$1
    [ -z "$child" ] || { handed=1 && kill -s "$1" "$child" 2>/dev/null; }
}
trap 'hand_down TERM' TERM
trap 'hand_down INT' INT

pause=${MERT_JAX_PAUSE:-10} # seconds in which the other hosts notice and restart too
while true; do
    "$@" &
    child=$!
    # a signal may arrive before there is a child; a second one would make the child exit at once
    [ -z "$asked" ] || [ -n "$handed" ] || hand_down "$asked"
    # a trap interrupts wait: the child is still saving
    while true; do
        wait "$child"
        code=$?
        kill -0 "$child" 2>/dev/null || break
    done
    child=
    case $code in
        75 | 134 | 137 | 139) ;;
        *) exit "$code" ;;
    esac
    [ -z "$asked" ] || exit "$code"
    echo "ended with code $code: again in $pause s" >&2
    sleep "$pause" &
    wait $!
    [ -z "$asked" ] || exit "$code"
done
