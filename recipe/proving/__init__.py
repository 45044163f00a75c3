"""What a run promises, held against stock transformers and peft on the user's own config."""
