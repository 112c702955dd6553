"""The parts of training and evaluation. They know no runner and no run folder."""
