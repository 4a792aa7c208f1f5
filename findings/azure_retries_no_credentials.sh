#!/usr/bin/env bash
# Azure's storage client asks four times for a credential that does not exist, and sleeps over a minute in between.
#
# Guess: where a credential raises ClientAuthenticationError the request was never sent, so nothing can pass by waiting:
# the error comes at once, as botocore's NoCredentialsError does.
# So is: the client's retry policy stands outside of its authentication policy and takes the error for a failed request:
# it waits about 18, 24 and 42 s (15 + 3^n, ± 3), asking the credential again each time. On a machine where nobody has
# logged in, the first `exists` through adlfs or azure-storage-blob answers after some 80 s.
# Seen with azure-storage-blob 12.31.1 and azure-core 1.41.0 on Python 3.11. Fails when that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet 'azure-storage-blob==12.31.1' 'azure-core==1.41.0'
"$folder/env/bin/python" - <<'PYTHON'
import time

from azure.core.exceptions import ClientAuthenticationError
from azure.storage.blob import BlobServiceClient

asked, slept = [], []
time.sleep = slept.append  # to see the waits without waiting


class Nobody:
    def get_token(self, *scopes, **options):
        asked.append(scopes)
        raise ClientAuthenticationError("nobody has logged in here")


client = BlobServiceClient("https://account.blob.core.windows.net", credential=Nobody())
try:
    client.get_container_client("container").exists()
except ClientAuthenticationError as error:
    print(f"asked {len(asked)} times, slept {', '.join(f'{one:.0f}' for one in slept)} s, then: {error}")
assert len(asked) == 4, "a credential that does not exist is asked for once now: this finding is out of date"
assert sum(slept) > 60, slept
PYTHON
