"""Scripts that start the trainer on many nodes, and the look at a node before it does."""
