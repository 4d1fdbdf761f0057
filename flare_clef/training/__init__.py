"""Makes the weights: the paper's pre-training and fine-tuning. Nothing outside imports it."""
