#!/bin/bash
# Train Qwen3-4B on the hosts of a TPU slice, such as v5e 4x4 (4 hosts) or v5p 4x4x4 (16 hosts).
#
#   gcloud compute tpus tpu-vm scp --recurse . NAME:sepsis-jax --worker=all --zone ZONE
#   gcloud compute tpus tpu-vm ssh NAME --worker=all --zone ZONE \
#     --command 'cd sepsis-jax && bash configs/launch/tpu_vm.sh sft configs/train_qwen3_4b_v5e16.yaml \
#       --llm models/Qwen3-4B --episodes runs/mimic --out runs/sft'
#
# What runs where:
#   learners     one process per host, with all of its chips; the slice tells them of one another.
#   generation   in stage rl every process samples its own patients, over the chips of its host.
# All hosts read and write one folder (Filestore, or a bucket mounted with gcsfuse). A run that was
# cut off goes on from its last checkpoint: the same line again, on every host.
set -euo pipefail

STAGE=${1:?sft, bc or rl}
CONFIG=${2:?a file of configs/}
shift 2

[ -d .venv ] || python3.11 -m venv .venv
.venv/bin/pip install --quiet -c constraints.txt -e . "jax[tpu]"
SEPSIS_JAX_DISTRIBUTED=auto exec .venv/bin/sepsis-jax policy "$STAGE" --config "$CONFIG" --resume "$@"
