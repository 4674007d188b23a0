"""Files: configurations, checkpoints, safetensors and GGUF; read strictly, written atomically."""
