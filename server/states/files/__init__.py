"""Where the files of snapshots are: beside the index, or in it with working copies here."""
