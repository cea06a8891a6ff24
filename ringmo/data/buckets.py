"""S3's door for imagery: what lies below a prefix, and objects brought here, whole or not at all.

Any S3-compatible store: `ingest.endpoint` in params.yaml names one that is not Amazon's.
Credentials come from the environment, as with all of Amazon's tools.
"""

import hashlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

from ringmo import clocks
from ringmo.errors import BadInput, RingmoError, Unreachable

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 10, 60
TRIES = 5  # of a request, and of an object that breaks off on its way
FIRST_PAUSE_S = 0.5  # doubled each time
PART = 1 << 20  # bytes read at once
REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "403"}
NOT_THERE = {"NoSuchKey", "404"}


@dataclass(frozen=True)
class Object:
    """An object below a prefix; `path` is what follows it, `mark` changes with the bytes."""

    path: str
    size: int
    mark: int


@dataclass(frozen=True)
class Bucket:
    """Objects below s3://NAME/PREFIX. Threads may share one."""

    url: str
    endpoint: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A connection stays in its process; a worker has one for all images of a bucket.
        return _known, (self.url, self.endpoint)

    def __str__(self) -> str:
        return self.url.rstrip("/")

    @property
    def name(self) -> str:
        return self.url.removeprefix("s3://").partition("/")[0]

    @property
    def prefix(self) -> str:
        """Ends with a slash, or is empty."""
        inside = self.url.removeprefix("s3://").partition("/")[2].strip("/")
        return f"{inside}/" if inside else ""

    def objects(self) -> Iterator[Object]:
        """Every object below the prefix, by key.

        Raises:
            BadInput: no such bucket, no credentials or wrong ones.
            Unreachable: no answer, also after several tries.
        """
        with self._errors():
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.name, Prefix=self.prefix):
                for found in page.get("Contents", []):
                    path = found["Key"].removeprefix(self.prefix)
                    if path and not path.endswith("/"):
                        mark = hashlib.sha256(str(found["ETag"]).encode()).digest()[:7]
                        yield Object(path, found["Size"], int.from_bytes(mark))

    def fetch(self, path: str, to: Path) -> None:
        """Bring an object here.

        Raises:
            FileNotFoundError: it is gone.
            BadInput, Unreachable: as with `objects`; and it broke off several times.
        """
        from botocore.exceptions import ClientError, IncompleteReadError

        to.parent.mkdir(parents=True, exist_ok=True)
        # Several workers may bring the same object, as the vectors of many scenes.
        temporary = to.with_name(f"{to.name}.{uuid4().hex}.tmp")
        pause = FIRST_PAUSE_S
        for attempt in range(1, TRIES + 1):
            begun = False
            try:
                with self._errors():
                    # Up to here boto itself tries again.
                    answer = self._client.get_object(Bucket=self.name, Key=self.prefix + path)
                    begun = True
                    with temporary.open("wb") as file:
                        for part in answer["Body"].iter_chunks(PART):
                            file.write(part)
                        came, wanted = file.tell(), answer["ContentLength"]
                    if came != wanted:
                        raise IncompleteReadError(actual_bytes=came, expected_bytes=wanted)
                temporary.replace(to)
                return
            except RingmoError as error:
                temporary.unlink(missing_ok=True)
                cause = error.__cause__
                if isinstance(cause, ClientError) and _code(cause) in NOT_THERE:
                    raise FileNotFoundError(2, "it is gone", path) from None
                if not begun or attempt == TRIES:
                    raise
            time.sleep(pause)
            pause *= 2

    def put(self, path: str, source: Path) -> None:
        """Bring a file there; a large one goes in parts, and is there when the last has come.

        Raises:
            BadInput, Unreachable: as with `objects`.
        """
        from boto3.exceptions import S3UploadFailedError

        with self._errors():
            try:
                self._client.upload_file(str(source), self.name, self.prefix + path)
            except S3UploadFailedError as error:
                # It hides what went wrong behind one of its own.
                raise error.__context__ or error from None

    def opened(self, path: str) -> "OpenObject | None":
        """An object, of which what is read is brought; None: there is none of this very key.

        Raises:
            BadInput, Unreachable: as with `objects`.
        """
        from botocore.exceptions import ClientError

        try:
            with self._errors():
                found = self._client.head_object(Bucket=self.name, Key=self.prefix + path)
        except BadInput as error:
            cause = error.__cause__
            if isinstance(cause, ClientError) and _code(cause) in NOT_THERE:
                return None
            raise
        return OpenObject(self, path, int(found["ContentLength"]), found["ETag"])

    def part(self, path: str, start: int, end: int, mark: str) -> bytes:
        """Bytes [start, end) of the object with this ETag.

        Raises:
            BadInput, Unreachable: as with `objects`; it is another object by now.
        """
        wanted = {"Bucket": self.name, "Key": self.prefix + path, "IfMatch": mark}
        with self._errors():
            answer = self._client.get_object(**wanted, Range=f"bytes={start}-{end - 1}")
            return bytes(answer["Body"].read())

    @cached_property
    def _client(self) -> Any:
        return self._made(CONNECT_TIMEOUT_S, READ_TIMEOUT_S, TRIES)

    def _made(self, connect_s: float, read_s: float, tries: int) -> Any:
        import boto3
        from botocore.config import Config

        return boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            config=Config(
                connect_timeout=connect_s,
                read_timeout=read_s,
                retries={"mode": "standard", "total_max_attempts": tries},
                signature_version="s3v4",
                s3={"addressing_style": "path" if self.endpoint else "auto"},
                # S3-compatible stores do not all know the checksums that boto sends since 1.36.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                max_pool_connections=16,
            ),
        )

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What boto raises, as one line of ours; its own error is the cause."""
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            ConnectionError,
            HTTPClientError,
            IncompleteReadError,
            NoCredentialsError,
            PartialCredentialsError,
        )

        where = self.url + (f" at {self.endpoint}" if self.endpoint else "")
        credentials = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        try:
            yield
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise BadInput(f"{where}: no credentials: set {credentials}") from error
        except ClientError as error:
            code, answer = _code(error), error.response["ResponseMetadata"]
            status, date = answer["HTTPStatusCode"], answer.get("HTTPHeaders", {}).get("date")
            ahead_s = clocks.ahead_s(date, time.time(), time.time())
            if status in (400, 403) and (reason := clocks.why_refused(ahead_s)):
                raise Unreachable(f"{where}: {reason}") from error
            if code in REFUSED:
                raise BadInput(f"{where}: refused ({code}): look at {credentials}") from error
            if code == "NoSuchBucket":
                raise BadInput(f"{where}: no such bucket") from error
            if status >= 500 or code in ("SlowDown", "TooManyRequests", "RequestTimeout"):
                raise Unreachable(f"{where}: {code}, also after {TRIES} tries") from error
            raise BadInput(f"{where}: {code}") from error
        except (ConnectionError, HTTPClientError, IncompleteReadError) as error:
            said = " ".join(str(error).split())[:160]
            raise Unreachable(f"{where}: {said} (tried {TRIES} times)") from error
        except (BotoCoreError, ValueError) as error:
            raise BadInput(f"{where}: {' '.join(str(error).split())[:160]}") from error


class OpenObject(io.RawIOBase):
    """An object as a file that is read from; `failure` is why a part of it could not be had."""

    def __init__(self, bucket: Bucket, path: str, size: int, mark: str) -> None:
        self.bucket, self.path, self.size, self.mark = bucket, path, size, mark
        self.at = 0
        self.failure: RingmoError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        end = min(self.size, self.at + len(buffer))
        if end <= self.at:
            return 0
        try:
            data = self.bucket.part(self.path, self.at, end, self.mark)
        except RingmoError as error:
            # Whoever reads through a C library hears no exception.
            self.failure = error
            raise OSError(5, str(error)) from error
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def probe(url: str, endpoint: str | None, *, write: bool, limit_s: float = 4) -> None:
    """Whether what lies below a prefix can be read, and written: soon, without a second try.

    What it writes it removes.

    Raises:
        BadInput, Unreachable: as with `Bucket.objects`.
    """
    bucket = Bucket(url, endpoint)
    with bucket._errors():
        client = bucket._made(limit_s, limit_s, 1)
        client.list_objects_v2(Bucket=bucket.name, Prefix=bucket.prefix, MaxKeys=1)
        if write:
            key = f"{bucket.prefix}.ringmo-doctor-{uuid4().hex}"
            client.put_object(Bucket=bucket.name, Key=key, Body=b"")
            client.delete_object(Bucket=bucket.name, Key=key)


@lru_cache(maxsize=256)
def _known(url: str, endpoint: str | None) -> Bucket:
    return Bucket(url, endpoint)


def _code(error: Any) -> str:
    return str(error.response["Error"].get("Code", "unknown"))
