"""The ranks of a model in processes of their own."""
