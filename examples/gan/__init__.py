"""A GAN on the digits: two networks, two optimizers, one runner."""
