#!/usr/bin/env bash
# 7B, a LoRA adapter of rank 32, one GPU of 80 GB (A100, H100). First `make gpu`, then with .venv-gpu/bin on the path:
#
#   recipes/7b-lora-80gb.sh
#   recipes/7b-lora-80gb.sh data/mix --tools Base_Generator Python_Coder lab.web.Wikipedia_Search
#
# The first command trains on TinyWorld, whose questions are English and whose search is local. The second one trains on
# the paper's mix, which `python -m lab.prepare mix` makes.
#
# Memory, beside 2 to 5 GiB of CUDA itself:
#   7.616e9 parameters x 2 bytes (the frozen base in bfloat16)                14.2 GiB
#   81e6 adapter parameters x 16 bytes                                           1.2 GiB
#   one vLLM engine for planner (with the adapter) and frozen modules           39.8 GiB
#   no reference policy: it is the base with the adapter switched off
#   activations of 16,384 tokens, recomputed layer by layer                      about 8 GiB
#
# Measured: nothing yet, neither memory nor time nor score.
set -euo pipefail
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}
TASK=${1:-tinyworld}
python train.py --model "$MODEL" --run_dir "runs/7b-lora-80gb-${TASK##*/}" --task "$TASK" \
    --engine vllm --engine_memory 0.5 \
    --questions_per_step 32 --group_size 8 --steps 100 --max_turns 3 --max_tokens 512 --result_chars 2000 \
    --learning_rate 1e-5 --warmup_steps 5 --decay False --updates_per_step 1 --tis_cap 2 --micro_batch_tokens 16384 \
    --lora_rank 32 \
    "${@:2}"
