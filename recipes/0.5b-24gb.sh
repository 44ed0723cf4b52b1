#!/usr/bin/env bash
# 0.5B, all weights, one GPU of 24 GB (RTX 3090, 4090, A10). First `make gpu`, then with .venv-gpu/bin on the path:
#
#   recipes/0.5b-24gb.sh
#   recipes/0.5b-24gb.sh data/mix --tools Base_Generator Python_Coder lab.web.Wikipedia_Search
#
# The first command trains on TinyWorld, whose questions are English and whose search is local. The second one trains on
# the paper's mix, which `python -m lab.prepare mix` makes.
#
# Memory, beside 2 to 5 GiB of CUDA itself:
#   0.494e9 parameters x 16 bytes (float32 weights, gradients, two moments)    7.4 GiB
#   two vLLM engines, bfloat16 weights and KV cache, 0.2 of the card each        9.6 GiB
#   reference policy in bfloat16                                                 0.9 GiB
#   activations of 8,192 tokens, recomputed layer by layer; logits by chunks     about 2 GiB
#
# Measured: nothing yet, neither memory nor time nor score.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-0.5B-Instruct}
TASK=${1:-tinyworld}
python train.py --model "$MODEL" --run_dir "runs/0.5b-24gb-${TASK##*/}" --task "$TASK" \
    --engine vllm --engine_memory 0.2 \
    --questions_per_step 32 --group_size 8 --steps 100 --max_turns 3 --max_tokens 512 --result_chars 2000 \
    --learning_rate 1e-6 --warmup_steps 5 --decay False --updates_per_step 1 --tis_cap 2 --micro_batch_tokens 8192 \
    "${@:2}"
