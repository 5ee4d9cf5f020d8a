#!/bin/sh
# Train the models of the zoo, strictly one after another, at low priority. Log: tools/zoo/.work/queue.log
#
#   PYTHON=/path/to/python nice -n 19 setsid nohup tools/zoo/queue.sh > /dev/null 2>&1 &
#
# A model whose training was interrupted resumes from its checkpoint in .work/<name>/; remove that folder to start afresh.
set -u
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.." || exit 1
mkdir -p "$here/.work"
# Passive waiting: threads that spin at barriers cost far more than they save on a machine that is shared.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
for model in ${*:-llama repvgg moe mamba rwkv}; do
  if ! "${PYTHON:-python}" "tools/zoo/train_tiny_$model.py" >> "$here/.work/queue.log" 2>&1; then
    echo "$(date -u +%FT%TZ) tiny-$model FAILED, see queue.log" >> "$here/.work/status.txt"
  fi
done
echo "$(date -u +%FT%TZ) queue finished" >> "$here/.work/status.txt"
