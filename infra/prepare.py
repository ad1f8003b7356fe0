"""What servers need before they can serve: ``storage`` makes the databases and the bucket, ``pools`` the work pools.

Jobs of compose and Kubernetes run it in the image of the servers. What is there already stays as it is.
"""

from __future__ import annotations

import os
import sys


def storage() -> None:
    """The two databases on the PostgreSQL of LLMILL_POSTGRES, and the bucket of MLFLOW_ARTIFACTS_DESTINATION."""
    import boto3  # type: ignore[import-untyped]

    from flows.prefect.up import prepare_postgres

    print(f"databases: {prepare_postgres(os.environ['LLMILL_POSTGRES'])}")
    bucket = os.environ["MLFLOW_ARTIFACTS_DESTINATION"].removeprefix("s3://").partition("/")[0]
    client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    if bucket not in [entry["Name"] for entry in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=bucket)
    print(f"bucket: {bucket}")


def pools() -> None:
    """llmill's work pools, and what finds crashed runs, on the Prefect server of PREFECT_API_URL."""
    from flows.engine.services import GPU_POOL, POOL
    from flows.prefect.pools import make_ready

    make_ready(os.environ["PREFECT_API_URL"], (POOL, GPU_POOL))
    print(f"work pools: {POOL}, {GPU_POOL}")


if __name__ == "__main__":
    {"storage": storage, "pools": pools}[sys.argv[1]]()
