#!/usr/bin/env bash
# Rebuild EmojiWorld from nothing; each step resumes from its own checkpoint in runs/emoji.
# One thread a job: two jobs of one thread do more on two cores than one of two.
set -euo pipefail
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=${PYTHON:-.venv/bin/python}
out=runs/emoji
run() { $python -m "diffalign.emoji_world.workshop.$@"; }
mkdir -p $out/packages
run build_sprites $out/packages
run write_prompts
run train_vae $out/vae
run train_clip $out/clip --seed 1
run train_verifier $out/verifier &
run train_base sd $out/sd --vae $out/vae --clip $out/clip
wait
run train_base sd3 $out/sd3 --teacher $out/sd &
run train_base flux $out/flux --teacher $out/sd
wait
run train_clip $out/judge --seed 2 --patch 16 --steps 4000 &
run distill $out/turbo --sd $out/sd --latents $out/latents.pt
wait
run train_verifier $out/referee --referee --vae $out/vae --steps 2600
run train_preference $out/preference --clip $out/clip
run train_aesthetic $out/aesthetic --clip $out/clip
run install $out
