"""Numbers of bytes for people."""


def size_text(num_bytes: int) -> str:
    """`4.4 MiB`: one digit after the point, in the largest unit that gives at least 1."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
