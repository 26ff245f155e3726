"""The way to and from Hugging Face's tools: transformers, tokenizers, the evaluation harness."""
