"""Learning that can be recalled: questions and answers about a text, learned without the text in view."""
