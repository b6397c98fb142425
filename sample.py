"""Draw prompts with a pipeline and a LoRA: python sample.py --lora RUN --prompts "a red apple" """

from diffalign.commands.cli import sample

if __name__ == "__main__":
    raise SystemExit(sample())
