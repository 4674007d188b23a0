"""Trains a converted model to imitate its teacher."""
