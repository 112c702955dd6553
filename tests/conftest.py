"""What all tests share: an environment that reaches for nothing of the person who runs them."""

from __future__ import annotations

import os
import tempfile

# Credentials and endpoints of the user's own stores and Prefect must not leak into a test.
FOREIGN = ("AWS_", "GOOGLE_", "GCLOUD_", "GCSFS_", "PREFECT_", "FSSPEC_")
for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]
# Launcher variables of an outer torchrun would make every test a rank.
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
    os.environ.pop(name, None)

# Before Prefect is imported: it reads its settings once.
_prefect_home = tempfile.TemporaryDirectory(prefix="prefect-home-")
os.environ.update(
    PREFECT_HOME=_prefect_home.name,
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_LOGGING_TO_API_ENABLED="false",
    DO_NOT_TRACK="1",
    OMP_NUM_THREADS="1",
    AWS_EC2_METADATA_DISABLED="true",
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT="false",
)

pytest_plugins = [
    "tests.prefect_fixtures",
    "tests.rank_fixtures",
    "tests.run_fixtures",
    "tests.store_fixtures",
]
