"""One of the processes that `app.launch` starts: the command line, which ends with its launcher."""

import os
import signal
import sys
import threading

from lora_engine.app.cli import main


def _follow_the_launcher() -> None:
    """Ends this process when the launcher, which holds the other end of its input, is gone."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_follow_the_launcher, daemon=True).start()
    main(sys.argv[1:])
