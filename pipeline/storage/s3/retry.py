"""When a request to S3 is sent again, and how long is waited before: `ask`.

A hiccup is tried again at once, a busy server for a bounded time with random, growing pauses, and credentials that were
refused are read once more. botocore's own retries are off: its clients share one budget, which an outage uses up.
"""

from __future__ import annotations

import random
import time
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from p3d.pipeline.storage.s3.client import client_for, forget
from p3d.pipeline.storage.s3.errors import cut_off, from_botocore, from_reply
from p3d.pipeline.storage.store import StoreOptions

PAUSE_S = 0.2  # after the first "later" of a busy server; doubles
LONGEST_PAUSE_S = 4.0
# botocore takes a reply whose content never came for one that says nothing; these always say this
SAYS = {"list_objects_v2": "IsTruncated", "copy_object": "CopyObjectResult"}


def ask(options: StoreOptions, operation: str, where: str, least_patience_s: float = 0.0, **params: Any) -> Any:
    """The reply to one request about the object or prefix `where`. StoreError or InputError when it is given up.

    What may pass is tried again for `least_patience_s` at least.
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
        except BotoCoreError as error:
            trouble = from_botocore(error, where)
        if trouble.renew and not renewed:
            forget(client)
            renewed = True
        elif trouble.patience_s and (  # twice at least, however long the first time took
            pause_s == PAUSE_S or time.monotonic() - began + pause_s < max(trouble.patience_s, least_patience_s)
        ):
            time.sleep(random.uniform(pause_s / 2, pause_s))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        else:
            raise trouble.error
        if "Body" in params:
            params["Body"].seek(0)
