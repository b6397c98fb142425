#!/usr/bin/env bash
# Rebuild EmojiWorld from nothing; each step resumes from its own checkpoint in runs/emoji.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
out=runs/emoji
mkdir -p $out/packages
$python -m diffalign.emoji_world.build_sprites $out/packages
$python -m diffalign.emoji_world.write_prompts
$python -m diffalign.emoji_world.train_vae $out/vae
$python -m diffalign.emoji_world.train_clip $out/clip --seed 1
$python -m diffalign.emoji_world.train_base $out/sd --vae $out/vae --clip $out/clip --sizes 43 49
$python -m diffalign.emoji_world.verifier $out/verifier
$python -m diffalign.emoji_world.train_clip $out/judge --seed 2 --patch 16
$python -m diffalign.emoji_world.install $out
