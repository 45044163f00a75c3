"""Checkpoint → tokenizer, base model, LoRA; attention that cannot cross rows."""
