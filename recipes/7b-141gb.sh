#!/usr/bin/env bash
# 7B, all weights, one GPU of 141 GB (H200). First `make gpu`, then with .venv-gpu/bin on the path:
#
#   recipes/7b-141gb.sh
#   recipes/7b-141gb.sh data/mix --tools Base_Generator Python_Coder lab.web.Wikipedia_Search
#
# The first command trains on TinyWorld, whose questions are English and whose search is local. The second one trains on
# the paper's mix, which `python -m lab.prepare mix` makes.
#
# Memory, beside 2 to 5 GiB of CUDA itself:
#   7.616e9 parameters x 6.1 bytes (bfloat16 weights and gradients, moments in 8 bits,
#                                rounded at random, so that small updates count)  43.3 GiB
#   two vLLM engines, bfloat16 weights and KV cache, 0.25 of the card each       70.0 GiB
#   reference policy in bfloat16                                                 14.2 GiB
#   activations of 16,384 tokens, recomputed layer by layer                      about 8 GiB
#   The planner's engine sleeps during the gradient step, so 35 of these GiB are free then.
#
# Measured: nothing yet, neither memory nor time nor score.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
TASK=${1:-tinyworld}
python train.py --model "$MODEL" --run_dir "runs/7b-141gb-${TASK##*/}" --task "$TASK" \
    --engine vllm --engine_memory 0.25 \
    --questions_per_step 32 --group_size 8 --steps 100 --max_turns 3 --max_tokens 512 --result_chars 2000 \
    --learning_rate 1e-6 --warmup_steps 5 --decay False --updates_per_step 1 --tis_cap 2 --micro_batch_tokens 16384 \
    --dtype bfloat16 --optimizer adamw8bit \
    "${@:2}"
