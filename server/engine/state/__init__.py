"""States of sequences: the pool on the device, snapshots in files, the prefix cache."""
