"""Where EmojiWorld's art, prompts and models are made and measured; `build.sh` runs it all."""
