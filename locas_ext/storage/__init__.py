"""A memory kept: files on disk, snapshots in RAM."""
