"""The children need limits on memory, /proc and handles of processes, which Linux has."""

from __future__ import annotations

import sys

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]
