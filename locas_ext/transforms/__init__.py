"""A memory changed as a whole: merged into its host, compressed."""
