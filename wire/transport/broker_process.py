"""The embedded broker's process: `python -m wire.transport.broker_process CONFIG`; the only file that imports
iotcore.

iotcore is rumqttd in a wheel. It has no shutdown, so it lives in a child that ends when its standard input
closes: the child dies with its parent, however that dies.
"""

from __future__ import annotations

import logging
import os
import sys
import threading


def main() -> None:
    """Serves until standard input closes or a signal comes."""
    # rumqttd logs every packet it routes as an error of its tracing; what counts is on our side of the wire.
    logging.basicConfig(level=logging.CRITICAL)
    from iotcore.iotcore import IotCoreBroker

    threading.Thread(target=_end_with_parent, daemon=True).start()
    IotCoreBroker(config_path=sys.argv[1]).run_forever()


def _end_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: its lock would stop the interpreter from ending
        continue
    os._exit(0)


if __name__ == "__main__":
    main()
