"""Memory files for tests: read, rewritten, refused."""

from support.helpers import random_ids

CONFIG, MEMORY = "locas_config.json", "locas_memory.safetensors"
IDS = random_ids(20, seed=5)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
