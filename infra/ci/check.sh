#!/usr/bin/env bash
# Checks a change of a configuration: plans the whole run, runs a small sample, compares it with the accepted run of that sample
# (its gates), and writes a report.
#
#   check.sh CONFIG
#
# Environment:
#   LODESET_LIMIT    images of the sample [1000]
#   LODESET_STORE    store of the checks [the `store` of the configuration]; one that stays between checks, so that there is an
#                    accepted run to compare with
#   LODESET_OUT      folder for plan.txt, gates.md, gates.xml, report.html and summary.md [lodeset-check]
#   LODESET_ACCEPT   1: accept the run if no gate is breached, for the branch that others are compared with
#   LODESET          the command [lodeset]
#   GITHUB_STEP_SUMMARY    file that summary.md is added to, if set
#
# Exit status: that of the first command that failed; 3 if a gate was breached, and 4 if the store is held by another run.
set -euo pipefail

config=${1:?usage: check.sh CONFIG}
limit=${LODESET_LIMIT:-1000}
out=${LODESET_OUT:-lodeset-check}
read -r -a lodeset <<<"${LODESET:-lodeset}"
store=()
if [[ -n ${LODESET_STORE:-} ]]; then
  store=(--set "store=$LODESET_STORE")
fi
sample=("$config" --limit "$limit" "${store[@]}")

mkdir -p "$out"
rm -f "$out"/{plan.txt,gates.md,gates.xml,report.html,summary.md}

# A fence that no line of a plan begins with, so that nothing in it is taken for Markdown.
fenced() {
  printf '~~~~~~~~~~~~~~~~text\n%s\n~~~~~~~~~~~~~~~~\n' "$(sed 's/^~~~/ ~~~/' "$1")"
}

finish() {
  {
    printf '# lodeset: %s\n\n' "$1"
    if [[ -s $out/gates.md ]]; then
      cat "$out/gates.md"
    else
      printf 'No gates were compared.\n'
    fi
    if [[ -s $out/plan.txt ]]; then
      printf '\n<details><summary>Plan of the whole run</summary>\n\n'
      fenced "$out/plan.txt"
      printf '\n</details>\n'
    fi
  } >"$out/summary.md"
  if [[ -n ${GITHUB_STEP_SUMMARY:-} ]]; then
    cat "$out/summary.md" >>"$GITHUB_STEP_SUMMARY"
  fi
  exit "$2"
}

code=0
"${lodeset[@]}" plan "$config" "${store[@]}" >"$out/plan.txt" 2>&1 || code=$?
cat "$out/plan.txt"
if ((code)); then
  finish "the plan failed" "$code"
fi

"${lodeset[@]}" run "${sample[@]}" || code=$?
case $code in
  0 | 3) ;;
  4) finish "another run holds the store, or a rollback does" 4 ;;
  *) finish "the run of a sample of $limit images failed" "$code" ;;
esac

# Status 3 may also come from a stage that refused what it found: then there is no run to compare.
gates=0
"${lodeset[@]}" gates "${sample[@]}" --markdown "$out/gates.md" --junit "$out/gates.xml" || gates=$?
"${lodeset[@]}" report "${sample[@]}" --out "$out/report.html" || printf 'check.sh: no report was written\n' >&2
if ((code == 3)); then
  finish "a gate was breached" 3
fi
case $gates in
  0) ;;
  2) printf 'check.sh: %s has no gates: nothing was compared\n' "$config" >&2 ;;
  *) finish "the gates could not be compared" "$gates" ;;
esac
if [[ ${LODESET_ACCEPT:-} == 1 ]]; then
  "${lodeset[@]}" accept "${sample[@]}" --why "check of ${GITHUB_SHA:-the configuration}"
fi
finish "a sample of $limit images is as it should be" 0
