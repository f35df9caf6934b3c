#!/usr/bin/env bash
# Train the two networks that ship in pipeline/assets, in a few minutes on two CPU cores.
# The same machine and library versions give the same bytes; others give equally good networks.
set -euo pipefail
cd "$(dirname "$0")/.."

train-student digits --loss ce --student resnet20 --epochs 30 --lr 0.1 --out runs/digits-teacher
cp runs/digits-teacher/last.safetensors pipeline/assets/digits-teacher.safetensors

python examples/train_clip.py digits --samples 720 --out runs/digits-clip
cp runs/digits-clip/* pipeline/assets/digits-clip/
