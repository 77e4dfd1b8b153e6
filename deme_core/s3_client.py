"""Clients of S3-compatible servers, their buckets, and what their errors mean in a sentence."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from boto3.session import Session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from deme_core.errors import NoAnswerError, StoreUnavailableError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MAX_ATTEMPTS = 4
_CONNECT_TIMEOUT_SEC, _READ_TIMEOUT_SEC = 5.0, 60.0


def make_client(num_connections: int) -> "S3Client":
    """Makes a client for the endpoint and with the credentials of the AWS_* variables; contacts nothing yet.

    Raises:
        StoreUnavailableError: the variables make none.
    """
    config = Config(
        connect_timeout=_CONNECT_TIMEOUT_SEC,
        read_timeout=_READ_TIMEOUT_SEC,
        retries={"mode": "standard", "total_max_attempts": MAX_ATTEMPTS},
        max_pool_connections=num_connections,
    )
    try:
        client = Session().client("s3", config=config)
    except (BotoCoreError, ValueError) as error:
        # Without its cause, which quotes the endpoint: it may hold a password.
        raise StoreUnavailableError(
            f"The AWS_* variables make no S3 client ({type(error).__name__}); AWS_ENDPOINT_URL must be a URL such "
            "as http://127.0.0.1:8333, and AWS_PROFILE a profile that exists."
        ) from None
    if "@" in client.meta.endpoint_url:
        raise StoreUnavailableError("AWS_ENDPOINT_URL must hold no password; use AWS_SECRET_ACCESS_KEY.")
    return client


def make_buckets(names: Iterable[str], *, endpoint_url: str, access_key: str, secret_key: str) -> None:
    """Makes buckets unless they are there, and writes to each, in one attempt: for a server that is just starting.

    Raises:
        StoreUnavailableError: the server does not take them (yet).
    """
    client = Session().client(
        "s3",
        endpoint_url=endpoint_url,
        aws_access_key_id=access_key,
        aws_secret_access_key=secret_key,
        region_name="us-east-1",
        config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}),
    )
    for name in names:
        try:
            _make_bucket(client, name)
        except (BotoCoreError, ClientError) as error:
            raise NoAnswerError(f"{endpoint_url} takes no bucket {name} yet ({type(error).__name__}).") from error


def _make_bucket(client: "S3Client", name: str) -> None:
    try:
        client.head_bucket(Bucket=name)
    except ClientError as error:
        if status(error) != 404:
            raise
        client.create_bucket(Bucket=name)
    client.put_object(Bucket=name, Key=".ready", Body=b"")


def status(error: ClientError) -> int:
    """HTTP status of an answer that is an error."""
    return error.response["ResponseMetadata"]["HTTPStatusCode"]


def refusal(place: str, error: ClientError) -> StoreUnavailableError:
    """What an answer of the server at ``place`` means; a NoAnswerError if the next attempt may succeed."""
    code = error.response["Error"]["Code"]
    if code == "NoSuchBucket":
        problem, mend = "has no such bucket", "create it or correct DEME_STORE_URI"
    elif code == "RequestTimeTooSkewed":
        problem, mend = "says that this machine's clock is wrong", "set it by a time server"
    elif status(error) in (401, 403):
        problem, mend = f"denies access ({code})", "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and their rights"
    elif status(error) >= 500 or status(error) == 429:  # It is overloaded or starting.
        return NoAnswerError(f"{place} answered {status(error)} ({code}); check the server and AWS_ENDPOINT_URL.")
    else:
        problem, mend = f"answered {status(error)} ({code})", "check the server and AWS_ENDPOINT_URL"
    return StoreUnavailableError(f"{place} {problem}; {mend}.")


def no_answer(place: str, error: Exception) -> StoreUnavailableError:
    """What it means that there was no answer; a NoAnswerError unless the request never left."""
    kind = type(error).__name__
    if "Credential" in kind:
        mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StoreUnavailableError(f"Cannot use {place} ({kind}); {mend}.")
    mend = "check that it is up and that AWS_ENDPOINT_URL is its address"
    return NoAnswerError(f"Cannot use {place} ({kind}); {mend}.")
