"""Seeing the gradients: statistics during training, and the paper's figures of a trained model."""
