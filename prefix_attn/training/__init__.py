"""Training of prefixes: `train` for many tasks at once, `TrainablePrefixes` for a loop of your own."""

from prefix_attn.training.examples import Example
from prefix_attn.training.loop import Loss, Trained, train
from prefix_attn.training.prefixes import TrainablePrefixes

__all__ = ["Example", "Loss", "TrainablePrefixes", "Trained", "train"]
