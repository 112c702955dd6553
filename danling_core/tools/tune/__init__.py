"""Tools that look for a setting by trying it for a few steps: the learning rate, the batch size."""
