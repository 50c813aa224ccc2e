"""Text in, text out: tokenizer, chat template, stop strings."""
