#!/usr/bin/env bash
# 3B, all weights, one GPU of 80 GB (A100, H100). First `make gpu`, then with .venv-gpu/bin on the path:
#
#   recipes/3b-80gb.sh
#   recipes/3b-80gb.sh data/mix --tools Base_Generator Python_Coder lab.web.Wikipedia_Search
#
# The first command trains on TinyWorld, whose questions are English and whose search is local. The second one trains on
# the paper's mix, which `python -m lab.prepare mix` makes.
#
# Memory, beside 2 to 5 GiB of CUDA itself:
#   3.086e9 parameters x 10 bytes (float32 weights and gradients, moments in 8 bits)  28.7 GiB
#   two vLLM engines, bfloat16 weights and KV cache, 0.2 of the card each              31.8 GiB
#   reference policy in bfloat16                                                        5.7 GiB
#   activations of 16,384 tokens, recomputed layer by layer                             about 6 GiB
#   The planner's engine sleeps during the gradient step, so 16 of these GiB are free then.
#
# Measured: nothing yet, neither memory nor time nor score.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-3B-Instruct}
TASK=${1:-tinyworld}
python train.py --model "$MODEL" --run_dir "runs/3b-80gb-${TASK##*/}" --task "$TASK" \
    --engine vllm --engine_memory 0.2 \
    --questions_per_step 32 --group_size 8 --steps 100 --max_turns 3 --max_tokens 512 --result_chars 2000 \
    --learning_rate 1e-6 --warmup_steps 5 --decay False --updates_per_step 1 --tis_cap 2 --micro_batch_tokens 16384 \
    --optimizer adamw8bit \
    "${@:2}"
