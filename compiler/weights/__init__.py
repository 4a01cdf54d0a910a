"""Weights on disk and at birth: streaming safetensors, model folders, Hugging Face's names, plan-independent init."""
