"""Looking into a cache: its facts, its samples as text, as JSON and as a page. Uses storage and a tokenizer."""
