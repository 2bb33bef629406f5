"""The study of TOFU: from fine-tuning to a page of results, and variations of the result."""
