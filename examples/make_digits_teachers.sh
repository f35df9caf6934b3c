#!/usr/bin/env bash
# Make the two networks that ship in pipeline/assets, from the repository's root. A few minutes on two CPU cores.
# The same machine and library versions give the same bytes; others give networks that are as good.
set -euo pipefail
cd "$(dirname "$0")/.."

train-student digits --loss ce --student resnet20 --epochs 30 --lr 0.1 --out runs/digits-teacher
cp runs/digits-teacher/last.safetensors pipeline/assets/digits-teacher.safetensors

python examples/train_clip.py digits --samples 720 --out runs/digits-clip
cp runs/digits-clip/* pipeline/assets/digits-clip/
