"""A real S3 interface on this machine (moto's server), which checks signatures and rights as S3 does."""

from __future__ import annotations

import json
import logging
import urllib.request
from dataclasses import dataclass
from typing import Any

import pytest

BUCKET = "artefacts"
REGION = "eu-central-1"
_RIGHTS = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}


@dataclass(frozen=True)
class Credentials:
    """What an operator has in the environment."""

    endpoint: str
    key_id: str
    secret: str

    def put_into(self, environment: pytest.MonkeyPatch) -> None:
        """Sets AWS's variables, plain HTTP allowed."""
        for name, value in (
            ("AWS_ENDPOINT_URL", self.endpoint),
            ("AWS_ACCESS_KEY_ID", self.key_id),
            ("AWS_SECRET_ACCESS_KEY", self.secret),
            ("AWS_REGION", REGION),
            ("AWS_ALLOW_HTTP", "true"),
        ):
            environment.setenv(name, value)


class S3Server:
    """Started when it is made; `stop` and `start` keep what is stored and the port. One user, one bucket."""

    def __init__(self) -> None:
        import boto3
        from moto.moto_server.threaded_moto_server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._kind = ThreadedMotoServer
        self._server = self._start(0)
        self.port: int = self._server.get_host_and_port()[1]
        endpoint = f"http://127.0.0.1:{self.port}"
        maker = {"endpoint_url": endpoint, "region_name": REGION}
        maker |= {"aws_access_key_id": "maker", "aws_secret_access_key": "maker"}
        self._post("/moto-api/reset")
        self._post("/moto-api/reset-auth", b"1000000")
        self._s3: Any = boto3.client("s3", **maker)
        self._s3.create_bucket(Bucket=BUCKET, CreateBucketConfiguration={"LocationConstraint": REGION})
        iam: Any = boto3.client("iam", **maker)
        iam.create_user(UserName="shoal")
        iam.put_user_policy(UserName="shoal", PolicyName="all", PolicyDocument=json.dumps(_RIGHTS))
        key = iam.create_access_key(UserName="shoal")["AccessKey"]
        self.credentials = Credentials(endpoint, key["AccessKeyId"], key["SecretAccessKey"])
        self._s3 = boto3.client(
            "s3",
            **{
                **maker,
                "aws_access_key_id": self.credentials.key_id,
                "aws_secret_access_key": self.credentials.secret,
            },
        )
        self._post("/moto-api/reset-auth", b"0")

    def start(self) -> None:
        """Answers again, on the same port."""
        self._server = self._start(self.port)

    def stop(self) -> None:
        """Answers nobody; what is stored stays."""
        self._server.stop()

    def stored(self) -> list[str]:
        """What lies in the bucket."""
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def _start(self, port: int) -> Any:
        server = self._kind(ip_address="127.0.0.1", port=port, verbose=False)
        server.start()
        return server

    def _post(self, path: str, body: bytes = b"") -> None:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=body, headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request, timeout=10).close()
