"""Before torch is imported: threads wait for one another asleep, since two workers of pytest share the processors."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
