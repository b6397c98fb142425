"""Fine-tune a text-to-image pipeline on a reward: python train.py configs/emoji_ddpo_jpeg.yaml"""

from diffalign.cli import train

if __name__ == "__main__":
    raise SystemExit(train())
