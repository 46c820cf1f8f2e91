"""`locas perplexity`: methods side by side on books."""
