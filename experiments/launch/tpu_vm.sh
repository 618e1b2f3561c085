#!/bin/bash
# flaxtransfer on all machines of a Cloud TPU VM.
#
#   gcloud compute tpus tpu-vm create NAME --zone ZONE --accelerator-type v5litepod-16 --version v2-alpha-tpuv5-lite
#   pip wheel . --no-deps --wheel-dir dist
#   experiments/launch/tpu_vm.sh NAME ZONE --data folder:scans/ --run runs/scans
#
# The words after the zone go to `flaxtransfer train`, on every machine at once. The images have to
# be there on every machine, at the same place; the run folder stays on worker 0 and is lost with
# it, so copy it from there. jax finds the other machines by the metadata of the TPU.
# PYTHON names the interpreter on the machines, 3.11 or newer; by default python3.11.
#
# Google gives this interface bug fixes only, and not the newest TPUs (use GKE for them).
# Tested: the shell's syntax, and the calls with a stand-in for gcloud. Never run on a TPU.
set -euo pipefail

if [ "$#" -lt 2 ]; then
  echo "usage: $0 NAME ZONE [options of flaxtransfer train]" >&2
  exit 2
fi
name=$1 zone=$2
shift 2
python=${PYTHON:-python3.11}

wheels=(dist/flaxtransfer-*.whl)
if [ ! -f "${wheels[0]}" ]; then
  echo "there must be a wheel in dist/, got none; pip wheel . --no-deps --wheel-dir dist" >&2
  exit 2
fi
wheel=${wheels[-1]}

everywhere() {
  gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$1"
}

gcloud compute tpus tpu-vm scp "$wheel" "$name:" --zone "$zone" --worker=all
everywhere "$python -m venv ~/flaxtransfer && ~/flaxtransfer/bin/pip install --quiet 'jax[tpu]' ~/$(basename "$wheel")"
everywhere "~/flaxtransfer/bin/flaxtransfer train$(printf ' %q' "$@") --resume"
