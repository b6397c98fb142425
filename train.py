"""Fine-tune a text-to-image pipeline on a reward: python train.py configs/emoji_ddpo_jpeg.yaml"""

from diffalign.commands.cli import train
from diffalign.training.stopping import leave

if __name__ == "__main__":
    leave(train())
