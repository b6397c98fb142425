#!/usr/bin/env bash
# The composition runs of docs/results.md: three seeds side by side on one GPU, nine minutes by the clock, and what the
# referee says of them. A run is stopped as by Ctrl-C and keeps what it has; ours had made 234, 230 and 233 updates.
set -uo pipefail
export NVIDIA_TF32_OVERRIDE=1 OMP_NUM_THREADS=2
runs=()
for seed in 0 1 2; do
  run=runs/emoji_composition_seed$seed
  timeout --signal INT "${SECONDS_A_RUN:-505}" python -m diffalign train configs/emoji_composition.yaml --train.seed $seed \
    --log.dir $run --overwrite --train.epochs 3000 --eval.every 150 --train.checkpoint_every 50 \
    --train.micro_batch 256 --sampler.batch 256 &
  runs+=("$run")
done
wait
python -m diffalign eval assets/emoji-sd "${runs[@]}" --pictures 4 --guidance 1 --steps 8 --out runs/composition_eval
python -m diffalign.emoji_world.workshop.extract_lora runs/emoji_composition_seed0 assets/emoji-composition --rank 16
