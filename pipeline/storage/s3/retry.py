"""Send a request to S3, and retry it: `ask`.

A busy or unreachable server is retried for a limited time, with random pauses that grow. Credentials that were refused
are read again once. botocore's own retries are off: its clients share one retry quota, which an outage uses up.
"""

from __future__ import annotations

import logging
import random
import time
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from p3d.pipeline.errors import StoreDenied
from p3d.pipeline.storage.s3.client import client_for, forget
from p3d.pipeline.storage.s3.errors import cut_off, from_botocore, from_reply
from p3d.pipeline.storage.store import StoreOptions

PAUSE_S = 0.2  # longest pause before the first retry; doubles with each retry
LONGEST_PAUSE_S = 4.0
# botocore accepts a reply whose content never arrived as an empty one; complete replies always have these keys
SAYS = {"list_objects_v2": "IsTruncated", "copy_object": "CopyObjectResult"}


def ask(options: StoreOptions, operation: str, where: str, least_patience_s: float = 0.0, **params: Any) -> Any:
    """The reply to one request about the object or prefix `where`. StoreError or InputError if it fails.

    A temporary error is retried for at least `least_patience_s` seconds.
    """
    began, pause_s, renewed = time.monotonic(), PAUSE_S, False
    while True:
        client = None
        try:
            client = client_for(options)
            reply = getattr(client, operation)(**params)
            if SAYS.get(operation, "ResponseMetadata") in reply:
                return reply
            trouble = cut_off(where)
        except ClientError as error:
            trouble = from_reply(error, where)
        except (BotoCoreError, HTTPError) as error:
            trouble = from_botocore(error, where)
        except RecursionError:  # botocore follows it
            raise StoreDenied(
                f"{where}: the server redirects without end; is this an S3 server, and not the login page of a network?"
            ) from None
        if trouble.renew and not renewed:
            forget(client)
            renewed = True
        elif trouble.patience_s and (  # at least one retry, however long the first attempt took
            pause_s == PAUSE_S or time.monotonic() - began + pause_s < max(trouble.patience_s, least_patience_s)
        ):
            logging.getLogger(__name__).info("%s of %s is tried again: %s", operation, where, trouble.error)
            time.sleep(random.uniform(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            raise trouble.error
        if "Body" in params:
            params["Body"].seek(0)
