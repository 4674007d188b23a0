"""What a model folder says about text: its tokenizer, and its chat template and how that is rendered. No torch."""
