"""What the loop of megarl/train.py calls: roll out, score, build the batch, learn, refit. Every rank calls the same."""
