"""Documents in, shuffled token batches out: sources, tokenizer, shards, order and loader."""
