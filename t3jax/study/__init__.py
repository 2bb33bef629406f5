"""The study of TOFU: from fine-tuning to a page of results, and what the result depends on."""
