"""Numbers of bytes, operations and seconds as people read them."""

from potstill.kl.fused import MIB

GIB = 2**30
# From the largest: so many, their name, and digits behind the point.
_COUNTS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
_SECONDS = ((86400 * 365, "years"), (86400, "days"), (3600, "h"), (60, "min"))


def shown_bytes(num_bytes: float) -> str:
    for unit, name in ((2**50, "PiB"), (2**40, "TiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.1f} {name}"
    if num_bytes >= GIB:
        return f"{num_bytes / GIB:.1f} GiB"
    return f"{num_bytes / MIB:.0f} MiB" if num_bytes >= MIB else f"{num_bytes / 1024:.0f} KiB"


def shown_count(number: float) -> str:
    """Three digits and a letter, as in 1.46 T."""
    for unit, letter in _COUNTS:
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:.3g}"


def shown_seconds(seconds: float) -> str:
    for unit, name in _SECONDS:
        if seconds >= 2 * unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
