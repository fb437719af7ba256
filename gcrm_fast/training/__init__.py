"""What a training run consists of; the loop itself is train.py."""
