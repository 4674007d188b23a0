"""The attention in torch operations, for every device."""
