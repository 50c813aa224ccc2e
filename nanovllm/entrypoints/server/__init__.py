"""An HTTP server in front of `AsyncLLM` that speaks OpenAI's API: `python -m nanovllm serve MODEL`."""
