"""Measuring: methods side by side on books and dialogues, forgetting, reports."""
