"""Text: tokenizer, chat template, incremental detokenisation, stop strings. Knows neither HTTP nor the engine."""
