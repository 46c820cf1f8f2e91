"""A memory in a model: autograd Functions in the place of FFN forwards, and back."""
