"""Making DiJiang models from pretrained transformers."""
