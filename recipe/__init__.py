"""Fine-tune LlamaForCausalLM checkpoints on instruction data, with proof."""

__version__ = "0.1.0"
