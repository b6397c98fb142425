"""EmojiWorld: emoji scenes, of which it is known what every prompt asks for.

These modules are the world: what users and tests run. `workshop/` makes its art, its prompts and
its models; nothing here imports the workshop. See docs/emoji_world.md.
"""

SPLITS = ("train", "held_out")
"""Of prompts: no denoiser was trained on the combinations that `held_out` asks for."""
