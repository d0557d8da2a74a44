"""Lines for the person at the keyboard. Standard library only."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """`42 s`, `7 min`, `3 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def time_left(seconds: float, done: float, n: float) -> str:
    """`3 min left` where `done` of n took so many seconds; "" where nothing is done yet, or nothing is left."""
    return f"{duration(max(0.0, seconds) * (n - done) / done)} left" if 0 < done < n else ""
