"""Fine-tune a text-to-image pipeline on a reward: python train.py configs/emoji_ddpo_jpeg.yaml"""

from diffalign.cli import train
from diffalign.stopping import leave

if __name__ == "__main__":
    leave(train())
