#!/usr/bin/env bash
# Stands in for the nodes' python in tests of the batch script: preflight passes, training counts seconds as steps.
# SAVE: steps between checkpoints; DIE: step at which every rank dies, with the status STATUS or 3.
case $* in *preflight*) exit 0 ;; esac
tracker=run/checkpoints/latest_checkpointed_iteration.txt
mkdir -p run/checkpoints
asked=
trap 'asked=yes' USR1 TERM
step=$(cat "$tracker" 2>/dev/null || echo 0)
while [ "$step" -lt 12 ]; do
    sleep 1
    step=$((step + 1))
    if [ "${DIE:-}" = "$step" ]; then exit "${STATUS:-3}"; fi
    if [ -n "${SAVE:-}" ] && [ $((step % SAVE)) -eq 0 ]; then echo "$step" >"$tracker"; fi
    if [ -n "$asked" ]; then
        echo "$step" >"$tracker"
        exit 75
    fi
done
