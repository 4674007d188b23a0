"""Files: safetensors, GGUF, JSON; read strictly, written atomically. Knows no network."""
