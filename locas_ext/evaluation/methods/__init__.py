"""What reads a text: Locas and the baselines it is compared with."""
