"""What others made: a Hugging Face checkpoint's names and encodings become canonical names and values."""
