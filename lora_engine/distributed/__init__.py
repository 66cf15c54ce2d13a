"""Several processes that train one model: who they are, and what they send each other."""

import os


def is_started() -> bool:
    """Whether torchrun, or a launcher like it, started this process as one of several."""
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
