"""Hosts, oracles and comparisons that several tests share."""
