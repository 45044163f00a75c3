"""The adapter's folder: plain PEFT files and ``recipe.json``."""
