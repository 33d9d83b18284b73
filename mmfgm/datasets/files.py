# Copyright (c) mmfgm authors.
"""Files: checksums, and writing in one step."""

import hashlib
import os
import os.path as osp
import uuid

from mmfgm.errors import UsageError


def sha256(path: str) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as f:
        for chunk in iter(lambda: f.read(1 << 20), b''):
            digest.update(chunk)
    return digest.hexdigest()


def write_file(filename: str, content: bytes) -> None:
    """Write a file that appears only when it is complete.

    Raises:
        UsageError: If it cannot be written.
    """
    # processes of several machines may have the same number
    unfinished = f'{filename}.{uuid.uuid4().hex}.tmp'
    try:
        with open(unfinished, 'wb') as f:
            f.write(content)
        os.replace(unfinished, filename)
    except OSError as e:
        raise UsageError(f'{filename!r} cannot be written: {e}') from e
    finally:
        if osp.exists(unfinished):
            os.remove(unfinished)
