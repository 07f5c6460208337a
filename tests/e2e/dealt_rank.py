"""`mpipipe` as a rank of a launch that deals ranks round two hosts: even ranks on one, odd ones on
the other. For tests of the layout on one machine: the name of the host is all that is not real.
"""

from __future__ import annotations

import os

from mpipipe.cli.main import main
from mpipipe.topology.launcher import detect

real = os.uname()
rank = detect(os.environ).rank or 0
dealt = os.uname_result((real.sysname, f"node{rank % 2}", *real[2:]))
os.uname = lambda: dealt

if __name__ == "__main__":
    main()
