"""What a transformers model looks like: its families, its FFNs, its projections, and which host it is."""
