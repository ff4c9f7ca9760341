"""How long something will still take, in words."""


def remaining(seconds: float, done: float, left: float) -> str:
    """The time for `left` more, where `done` took `seconds`: "about 40 s", "about 25 min", "about 1 h 40 min".

    Args:
        seconds: Since the beginning, or since a later moment from which `done` is counted.
        done: Epochs, steps or images, above 0.
        left: Of the same.
    """
    return f"about {duration(seconds / done * left)}"


def duration(seconds: float) -> str:
    """Seconds in words, as exact as a person wants them: "40 s", "25 min", "1 h 40 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
