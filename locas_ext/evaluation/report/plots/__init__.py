"""The plots, and how they look."""
