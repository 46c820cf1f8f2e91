"""While memorizing, the host's norms, residuals, rotary embedding, attention and loss run through kernels of ours."""
