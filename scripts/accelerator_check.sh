#!/bin/bash
# Checks on a machine with an accelerator, in under 8 minutes; installs nothing. Needs the package and its extra dev.
#   bash scripts/accelerator_check.sh [OUT.json]           # every stage
#   bash scripts/accelerator_check.sh OUT.json --cpu       # small sizes on the CPU: tries the script itself
# Each stage has a limit of its own and is written to OUT.json when it ends, so a run that is cut off leaves what it has.
set -u
cd "$(dirname "$0")/.."
out=${1:-accelerator.json}
shift || true
timeout 470 "${PYTHON:-python}" scripts/accelerator_check.py "$out" "$@"
