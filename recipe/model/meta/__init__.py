"""Meta's own layout: ``consolidated.*.pth``, ``params.json``, ``tokenizer.model``."""
