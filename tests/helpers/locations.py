"""Where the checkout, and what lies beside it for tests alone, is found."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
REFERENCE = Path(os.environ.get("ADAPTIVE_REFERENCE", REPOSITORY.parent / "shared" / "reference"))
DATA = Path(os.environ.get("ADAPTIVE_DATA", REPOSITORY.parent / "shared" / "data"))
CLUSTER = Path(os.environ.get("ADAPTIVE_CLUSTER", REPOSITORY.parent / "shared" / "cluster"))
