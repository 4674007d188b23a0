"""From logits to a token: penalties, masks, sampling, log-probabilities."""
